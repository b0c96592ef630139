"""Training by two nodes of one GPU each, here on one machine: the bits of one GPU, and an end when a node is lost."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nmoe import platform
from nmoe.checkpoint.reader import require_head
from nmoe.train.gate import compare
from tests.gpu.test_two_gpus import EVERY_PART, GPUS, HOPPER, ROOT, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason=f"{GPUS} HOPPER GPUS, 2 NEEDED: training by two nodes is not tested"),
]

SETS = ("batch.sequences=8", "batch.microbatch=2", "output.checkpoint_every=10", "output.metrics_every=1")
KILLED = """
import os, signal, sys
from nmoe.cli.main import run
from nmoe.train import loop
real = loop.train
def observe(step, phase):
    if (step, phase) == (4, sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
loop.train = lambda *given, **more: real(*given, observe=observe, **more)
sys.exit(run(sys.argv[2:]))
"""


def nodes(directory: Path, name: str, config: Path, *sets: str, dies: str = "") -> list[tuple[int, str]]:
    """Each rank's exit status and what it wrote. dies: the phase of step 4 in which rank 1 is killed."""
    own = [f'output.run_dir="{directory}/{name}"', f'output.metrics_dir="{directory}/metrics"', *sets]
    words = ["train", str(config), *(word for item in own for word in ("--set", item))]
    # As in torchrun's agent: the server lives as long as the ranks.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children: list[subprocess.Popen[str]] = []
    for rank in range(2):
        found = platform.variables_of_rank(rank, 2, store.port)
        variables = {name: value for name, value in found.items() if name not in platform.REFUSED}
        variables |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "CUDA_VISIBLE_DEVICES": str(rank)}
        program = ["-c", KILLED, dies] if dies and rank == 1 else ["-m", "nmoe"]
        with (directory / f"{name}.{rank}.log").open("w") as log:
            command = [sys.executable, *program, *words]
            children.append(
                subprocess.Popen(command, cwd=ROOT, env=variables, text=True, stdout=log, stderr=subprocess.STDOUT)
            )
    try:
        children[1].wait(timeout=240)
        children[0].wait(timeout=60)
    finally:
        for child in children:
            child.kill()
    logs = [(directory / f"{name}.{rank}.log").read_text() for rank in range(2)]
    return [(child.wait(), log) for child, log in zip(children, logs, strict=True)]


def finished(*given: object, **more: str) -> None:
    ends = nodes(*given, **more)  # type: ignore[arg-type]
    assert [status for status, _ in ends] == [0, 0], "\n".join(log[-3000:] for _, log in ends)


@pytest.mark.parametrize("config", [EVERY_PART, HOPPER], ids=["every part", "hopper"])
def test_two_nodes_train_the_same_bits_as_one_gpu(tmp_path, config):
    """Straight on one and on two, and begun on one GPU and finished on two nodes."""
    train(tmp_path, "one", config, 1, *SETS, "output.stop_after_step=20")
    finished(tmp_path, "nodes", config, *SETS, "output.stop_after_step=20")
    assert compare(tmp_path, "one", "nodes", 20)[0] == ""
    train(tmp_path, "moved", config, 1, *SETS, "output.stop_after_step=10")
    finished(tmp_path, "moved", config, *SETS, "output.stop_after_step=20")
    digests = {require_head(tmp_path / name / "checkpoints").state_digest for name in ("one", "nodes", "moved")}
    assert len(digests) == 1


@pytest.mark.parametrize("phase", ["backward", "optimizer"])
def test_a_killed_node_ends_the_other_and_is_named(tmp_path, phase):
    (status, log), (killed, _) = nodes(tmp_path, "killed", EVERY_PART, *SETS, dies=phase)
    assert killed == -signal.SIGKILL
    assert status == 1, log
    assert "rank 1 " in json.loads((tmp_path / "killed" / "error.json").read_text())["errors"][0]["message"]
    assert "Traceback" not in log
