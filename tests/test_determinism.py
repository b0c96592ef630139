"""The same plan gives the same bits: in fresh processes, whatever they drew before. Training itself draws nothing."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nmoe import platform
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


PLAIN = ["-m", "nmoe", "train", str(TINY), "--set"]
OFTEN = ("output.checkpoint_every=1", "output.metrics_every=1", "output.progress_every=1", "output.prefetch=16")
SELDOM = ("output.checkpoint_every=3", "output.prefetch=0", "eval.bpb.sequences=1", "output.keep_checkpoints=1")
PROCESSES = {
    "plain": (PLAIN, (), {}),
    "generators used": (["-c", PERTURBED], (), {}),
    "order of hashes": (PLAIN, (), {"PYTHONHASHSEED": "1"}),
    "saves and looks often": (PLAIN, OFTEN, {"PYTHONHASHSEED": "2"}),
    "saves and looks seldom": (PLAIN, SELDOM, {"PYTHONHASHSEED": "3"}),
    "threads": (PLAIN, (), {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "OMP_PROC_BIND": "true"}),
    "time and language": (PLAIN, (), {"TZ": "Asia/Kathmandu", "LC_ALL": "C", "LANG": "tr_TR.UTF-8", "COLUMNS": "33"}),
    "memory": (PLAIN, (), {"MALLOC_PERTURB_": "165", "MALLOC_ARENA_MAX": "1", "PYTHONMALLOC": "malloc"}),
}
"""Eight processes: what each runs, its own keys, its own variables."""


@pytest.mark.parametrize("name", PROCESSES)
def test_fresh_processes_give_the_same_bits(tmp_path, here, name):
    """Each in a directory of its own, with another order of hashes."""
    program, keys, variables = PROCESSES[name]
    mine = [*sets(tmp_path), *keys]
    words = [word for item in mine for word in ("--set", item)][1:] if program is PLAIN else mine
    variables = {**os.environ, "PYTHONHASHSEED": "random", **variables}
    command = [sys.executable, *program, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert of(tmp_path) == here[0]


def test_training_draws_from_no_global_generator(here):
    _, before, after = here
    assert after[0] == before[0]
    assert after[1] == before[1]
    assert torch.equal(after[2], before[2])


@pytest.mark.parametrize("mode", ["off", "with memory that nobody has written filled"])
def test_torch_s_mode_is_a_guard_and_changes_no_bit(here, tmp_path, monkeypatch, mode):
    """Every operation of the step repeats by itself; and with the mode's NaN in each new tensor it is the same step."""
    require = platform.require

    def changed(*given):
        found = require(*given)
        torch.use_deterministic_algorithms(mode != "off")
        torch.utils.deterministic.fill_uninitialized_memory = mode != "off"
        return found

    monkeypatch.setattr(platform, "require", changed)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    try:
        train(resolve(TINY, sets(tmp_path)), config_text="")
    finally:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = filled
    assert of(tmp_path) == here[0]


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
