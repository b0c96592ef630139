"""The gate's own launcher: what a rank is told, and what is said of one that ends otherwise or not at all."""

import json
import sys
from pathlib import Path

import pytest

from nmoe.errors import RunError
from nmoe.train.launcher import launch

TELL = (
    "import json, os, torch.distributed as d; from nmoe import platform; p = platform.process();"
    "s, _, _ = next(iter(d.rendezvous('env://'))); s.set(str(p.rank), ''); s.wait(['0', '1', '2']);"
    "print(json.dumps([p.rank, p.local_rank, p.world_size, p.local_world_size, p.master_address]))"
)


def test_ranks_meet_at_a_store_of_the_launcher(tmp_path):
    """As torchrun's: none of them serves it."""
    launch([sys.executable, "-c", TELL], tmp_path, [0, 0, 0], end_s=60)
    for rank in range(3):
        last = (tmp_path / f"rank{rank}.log").read_text().splitlines()[-1]
        assert json.loads(last) == [rank, rank, 3, 3, "127.0.0.1"]


def ending(codes: dict[int, str]) -> list[str]:
    """A command whose ranks do what is said of each."""
    return [sys.executable, "-c", f"import os, signal, sys; exec({codes}[int(os.environ['RANK'])])"]


def test_how_each_has_to_end(tmp_path):
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    launch(ending({0: "sys.exit(1)", 1: kill}), tmp_path, [1, -9], end_s=60)
    with pytest.raises(RunError) as caught:
        launch(ending({0: "sys.exit(1)", 1: "sys.exit('it is on fire')"}), tmp_path, [1, -9], end_s=60)
    (finding,) = caught.value.diagnostics
    assert finding.message == "an attempt of 2 ranks: rank 1 ended with 1, not -9"
    assert finding.notes == ("it is on fire",)
    assert finding.help == f"read its whole output in {tmp_path / 'rank1.log'}"


def test_a_rank_that_does_not_end_is_named_and_killed(tmp_path):
    waits = "print(os.getpid(), flush=True); signal.pause()"
    with pytest.raises(RunError, match=r"rank 1 was still there 1 s after the first had ended, not 1"):
        launch(ending({0: "sys.exit(1)", 1: waits}), tmp_path, [1, 1], end_s=1)
    assert not Path("/proc", (tmp_path / "rank1.log").read_text().strip()).exists()
