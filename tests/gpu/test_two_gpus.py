"""Training by two GPUs of one machine: bit for bit what one of them gives, and goes on from the other's checkpoints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nmoe import platform
from nmoe.checkpoint.reader import require_head
from nmoe.metrics.reader import read_rows
from nmoe.plan.resolve import resolve
from nmoe.train.gate import compare

GPUS = torch.cuda.device_count() if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9 else 0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason=f"{GPUS} HOPPER GPUS, 2 NEEDED: training by two GPUs is not tested"),
]

ROOT = Path(__file__).resolve().parents[2]
EVERY_PART = ROOT / "tests" / "gpu" / "every_part.toml"
HOPPER = ROOT / "configs" / "hopper.toml"


def train(directory: Path, name: str, config: Path, ranks: int, *sets: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in platform.REFUSED}
    own = [f'output.run_dir="{directory}/{name}"', f'output.metrics_dir="{directory}/metrics"', *sets]
    words = [str(config), *(word for item in own for word in ("--set", item))]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "nmoe", "train", *words], capture_output=True, text=True, check=False,
        cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("config", [EVERY_PART, HOPPER], ids=["every part", "hopper"])
def test_two_gpus_train_the_same_bits_as_one(tmp_path, config):
    """Straight on one and on two, and begun on two and finished on one."""
    sets = ["batch.sequences=8", "batch.microbatch=2", "output.checkpoint_every=10", "output.metrics_every=1"]
    train(tmp_path, "one", config, 1, *sets, "output.stop_after_step=20")
    train(tmp_path, "two", config, 2, *sets, "output.stop_after_step=20")
    assert compare(tmp_path, "one", "two", 20)[0] == ""
    train(tmp_path, "moved", config, 2, *sets, "output.stop_after_step=10")
    train(tmp_path, "moved", config, 1, *sets, "output.stop_after_step=20")
    digests = {require_head(tmp_path / name / "checkpoints").state_digest for name in ("one", "two", "moved")}
    assert len(digests) == 1


@pytest.mark.parametrize("config", [EVERY_PART, HOPPER], ids=["every part", "hopper"])
def test_an_arena_that_every_step_overflows_gives_the_same_bits(tmp_path, config):
    """The smallest arena, in which steps are repeated, and one with room for all that can come."""
    sets = ["batch.sequences=8", "batch.microbatch=2", "output.checkpoint_every=10", "output.metrics_every=1"]
    # More layers than the smallest arena can have, whose size an evaluation's larger batches would decide.
    sets += ["output.stop_after_step=12", "model.num_layers=5", "eval.bpb.sequences=1"]
    arena = resolve(config, sets, ranks=2, ranks_per_node=2).memory["none"].arena
    train(tmp_path, "one", config, 1, *sets)
    repeated = {}
    for name, rows in (("least", arena.layer), ("full", arena.worst)):
        train(tmp_path, name, config, 2, *sets, f"output.activation_rows={rows}")
        assert compare(tmp_path, "one", name, 12)[0] == ""
        found = read_rows(tmp_path / "metrics" / name, names=["memory/activation_rows", "time/repeated"])
        brought = [row.value for row in found if row.name == "memory/activation_rows"]
        assert 12 * 2 * arena.average <= sum(brought)  # of two passes' equal sums over ranks, the larger of each rank
        assert max(brought) <= arena.worst
        repeated[name] = [row.value > 0 for row in found if row.name == "time/repeated"]
    assert repeated == {"least": [True] * 12, "full": [False] * 12}
    digests = {require_head(tmp_path / name / "checkpoints").state_digest for name in ("one", "least", "full")}
    assert len(digests) == 1
