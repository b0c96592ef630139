"""Training on an H100 or H200: `python -m pytest -m gpu tests/gpu`. Ten minutes, most of it the two bench models."""

import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nmoe import platform
from nmoe.metrics.reader import read_rows
from nmoe.model.router import select
from nmoe.plan.resolve import resolve
from nmoe.train.gate import compare
from tests.gpu.one_step import CONFIGS, CPU, FLOAT32, errors, one_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="NO HOPPER GPU: training on sm_90a is not tested on this machine",
    ),
]

ROOT = Path(__file__).resolve().parents[2]
# Roundings that the GPU has and the CPU's bfloat16 has not: probabilities, their gradients, the logits' gradients,
# weighted activations. They are of the size and number of those that both have; and one more for small gradients.
MORE_ROUNDINGS, ONE_MORE = 2.0, 2**-8


@pytest.fixture
def device(monkeypatch):
    """This process made fit for sm_90a, as a training makes it."""
    for name in platform.REFUSED:
        monkeypatch.delenv(name, raising=False)
    deterministic = torch.are_deterministic_algorithms_enabled()
    platform.require("sm_90a", None)
    yield platform.device("sm_90a")
    torch.use_deterministic_algorithms(deterministic)


def nmoe(*words: str) -> str:
    """A command in a fresh process; its stdout."""
    environment = {name: value for name, value in os.environ.items() if name not in platform.REFUSED}
    done = subprocess.run(
        [sys.executable, "-m", "nmoe", *words], capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def train(directory: Path, name: str, config: Path, *sets: str) -> None:
    own = [f'output.run_dir="{directory}/{name}"', f'output.metrics_dir="{directory}/metrics"']
    nmoe("train", str(config), *(word for item in [*own, *sets] for word in ("--set", item)))


@pytest.mark.parametrize("config", CONFIGS)
def test_loss_and_every_gradient_agree_with_float32(config, device, monkeypatch, capsys):
    loss, gradients = one_step(config, [], monkeypatch)
    _, rounded = one_step(config, CPU, monkeypatch)
    wanted_loss, wanted = one_step(config, FLOAT32, monkeypatch)
    found, allowed = errors(gradients, wanted), errors(rounded, wanted)
    with capsys.disabled():
        worst = sorted(found, key=found.__getitem__, reverse=True)[:4]
        print(f"\n{config}: loss {loss} against {wanted_loss} in float32; largest errors, and the CPU's bfloat16:")
        for name in worst:
            print(f"  {name}: {found[name]:.2e}, {allowed[name]:.2e}")
    assert loss == pytest.approx(wanted_loss, rel=2**-12)
    wrong = {n: (e, allowed[n]) for n, e in found.items() if not e <= MORE_ROUNDINGS * allowed[n] + ONE_MORE}
    assert not wrong


def test_selection_is_the_cpus(device):
    """With ties, negative scores and both zeros."""
    score_TE = torch.randn(4096, 256, generator=torch.Generator().manual_seed(1))
    score_TE = torch.where(score_TE.abs() < 0.5, (score_TE * 4).round() / 4, score_TE)
    assert torch.equal(select(score_TE.to(device), 8).cpu(), select(score_TE, 8))


@pytest.mark.parametrize(("experts", "top_k"), [(4096, 64), (1, 1)])
def test_layout_at_its_bounds(experts, top_k, device):
    from nmoe.kernels.layout import layout_reference, make_layout

    expert_TK = torch.randint(0, experts, (1000, top_k), generator=torch.Generator().manual_seed(2))
    wanted, found = layout_reference(expert_TK, experts), make_layout(expert_TK.to(device), experts)
    tiles = int(wanted.num_tiles)
    for name, a, b in zip(wanted._fields, wanted, found, strict=True):
        assert torch.equal(a, b.cpu()[:tiles] if name.startswith("tile_") else b.cpu()), name


@pytest.mark.parametrize("config", CONFIGS)
def test_two_fresh_processes_have_the_same_bits_after_20_steps(config, tmp_path):
    for name in ("first", "second"):
        train(tmp_path, name, CONFIGS[config], "output.stop_after_step=20", "output.metrics_every=1")
    assert compare(tmp_path, "first", "second", 20)[0] == ""


@pytest.mark.parametrize("config", CONFIGS)
def test_gate_is_identical(config, tmp_path):
    nmoe("gate", str(CONFIGS[config]), "--steps", "15", "--kill", "4,9,13", "--directory", str(tmp_path / "gate"))


@pytest.mark.parametrize("config", ["super256", "moonlet6"])
def test_bench_models_train(config, tmp_path, capsys):
    """Twelve steps on the packaged text; tokens a second and memory are printed, the last save takes 40 GB of disk."""
    path = ROOT / "configs" / "bench" / f"{config}.toml"
    plan = resolve(path)
    text = 'data={kind="corpus", name="shakespeare", tokenizer={kind="bytes"}}'
    try:
        train(tmp_path, "run", path, text, "output.stop_after_step=12", "output.metrics_every=1")
        names = ["train/loss", "throughput/tokens_per_second", "memory/device_peak"]
        rows = {name: [row.value for row in read_rows(tmp_path / "metrics/run", names=[name])] for name in names}
    finally:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    losses = rows["train/loss"]
    with capsys.disabled():
        rate = statistics.median(rows["throughput/tokens_per_second"][2:])
        peak, planned = max(rows["memory/device_peak"]) / 2**30, plan.memory_bytes_per_rank["total"] / 2**30
        print(
            f"\n{config} on {torch.cuda.get_device_name()}: {rate:,.0f} tokens/s, device memory {peak:.2f} GiB at most "
            f"(plan {planned:.2f}), loss {losses[0]:.4f} to {losses[-1]:.4f}"
        )
    assert len(losses) == 12
    assert losses[-1] < losses[0]
