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
from nmoe.model.router import SigmoidRouter, select
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


@pytest.mark.parametrize(("experts", "top_k", "scale"), [(256, 7, 1.0), (64, 6, 2.446), (5, 1, 1.0), (40, 16, 1.0)])
def test_a_router_in_one_pass_is_the_router_in_many(experts, top_k, scale, device, monkeypatch):
    """The same experts, in the same order, and gradients that differ by roundings of the logits' gradient alone."""
    router = SigmoidRouter(
        hidden_size=136, num_experts=experts, top_k=top_k, num_groups=1, top_groups=1, route_scale=scale,
        bias_update_rate=0.001, bias_limit=None, bias_until_tokens=None,
    ).to(device)  # fmt: skip
    generator = torch.Generator().manual_seed(experts)
    w_ED, x_TD = (torch.randn(n, 136, generator=generator).bfloat16().to(device) for n in (experts, 1000))
    router.weight_ED = torch.nn.Parameter(w_ED / 8)
    router.weight_ED.grad_dtype = torch.float32
    router.bias_E = 0.1 * torch.randn(experts, generator=generator).to(device)
    dy_TK = torch.randn(1000, top_k, generator=generator).to(device)
    found = []
    for in_one_pass in (True, False):
        if not in_one_pass:
            monkeypatch.setattr(SigmoidRouter, "in_one_pass", lambda self, x_TD: False)
        leaf_TD = x_TD.clone().requires_grad_()
        router.weight_ED.grad = None
        indices_TK, weights_TK = router(leaf_TD)
        weights_TK.backward(dy_TK)
        found.append((indices_TK.long(), weights_TK.detach(), leaf_TD.grad, router.weight_ED.grad))
    (indices, weights, dx, dw), wanted = found
    # Scores that differ in their last bit may change places; nearly all tokens have none that close.
    same_T = (indices == wanted[0]).all(dim=1)
    assert int(same_T.sum()) >= 998
    assert torch.allclose(weights[same_T], wanted[1][same_T], rtol=1e-5, atol=1e-7)
    for a, b in ((dx[same_T], wanted[2][same_T]), (dw, wanted[3])):
        assert float((a.double() - b.double()).norm() / max(b.double().norm(), 1e-30)) < 2**-6 or top_k == 1


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
