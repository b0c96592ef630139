"""The same plan gives the same bits: in fresh processes, whatever they drew before. Training itself draws nothing."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nmoe.checkpoint.reader import require_head
from nmoe.metrics.reader import read_rows
from nmoe.plan.resolve import resolve
from nmoe.train.loop import train

TINY = Path(__file__).parent / "train" / "tiny.toml"
STEPS = 4

# A process that has used every global generator, and says afterwards what training has done to them.
PERTURBED = f"""
import random, sys
import numpy as np
import torch
random.seed(11); np.random.seed(12); torch.manual_seed(13)
for _ in range(100):
    random.random(); np.random.rand(); torch.rand(3)
before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
from nmoe.plan.resolve import resolve
from nmoe.train.loop import train
train(resolve({str(TINY)!r}, sys.argv[1:]), config_text="")
assert random.getstate() == before[0], "random"
assert np.random.get_state()[1].tolist() == before[1], "numpy"
assert torch.equal(torch.get_rng_state(), before[2]), "torch"
assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
assert torch.get_num_threads() == 1
"""


def sets(directory: Path) -> list[str]:
    return [f'output.run_dir="{directory}/run"', f"output.stop_after_step={STEPS}", "eval.bpb.every_tokens=64"]


def of(directory: Path) -> tuple[str, list[float], list[float], list[str]]:
    """(state digest, losses, held-out bits per byte, batch digests) of the run."""
    rows = read_rows(directory / "metrics" / "run")
    values = {
        name: [row.value for row in rows if row.name == name] for name in ("train/loss", "eval/bits_per_byte")
    }
    digests = [row.label for row in rows if row.name == "data/batch_digest"]
    state = require_head(directory / "run" / "checkpoints").state_digest
    assert len(values["train/loss"]) == len(values["eval/bits_per_byte"]) == len(digests) == STEPS
    return state, values["train/loss"], values["eval/bits_per_byte"], digests


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The run made in this process."""
    directory = tmp_path_factory.mktemp("here")
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    train(resolve(TINY, sets(directory)), config_text="")
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    return of(directory), before, after


@pytest.mark.parametrize(
    "program", [["-m", "nmoe", "train", str(TINY), "--set"], ["-c", PERTURBED]], ids=["plain", "perturbed"]
)
def test_fresh_processes_give_the_same_bits(tmp_path, here, program):
    """Also with another order of hashes, another number of OpenMP threads, and generators that have been used."""
    mine = sets(tmp_path)
    words = [word for item in mine for word in ("--set", item)][1:] if program[-1] == "--set" else mine
    variables = {**os.environ, "PYTHONHASHSEED": str(len(program)), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, *program, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    assert of(tmp_path) == here[0]


def test_training_draws_from_no_global_generator(here):
    _, before, after = here
    assert after[0] == before[0]
    assert after[1] == before[1]
    assert torch.equal(after[2], before[2])


def test_torch_refuses_what_cannot_be_repeated(here):
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.get_float32_matmul_precision() == "highest"


def test_an_inner_draw_is_named_by_its_purpose(here, tmp_path):
    """Another seed moves everything that is drawn: the data's order, the initial weights."""
    train(resolve(TINY, [*sets(tmp_path), "random.seed=1"]), config_text="")
    state, losses, _, digests = of(tmp_path)
    assert state != here[0][0]
    assert set(losses).isdisjoint(here[0][1])
    assert set(digests).isdisjoint(here[0][3])
