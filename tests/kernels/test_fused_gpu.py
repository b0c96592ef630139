"""The kernels of the rest of the step on a Hopper GPU: against float64, and bit for bit against themselves."""

import pytest
import torch

hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="NO HOPPER GPU: the kernels of the rest of the step are not tested on this machine",
)

CASES = [
    "norm one row", "norm", "norm slice", "norm heads", "norm wide", "norm odd", "add norm", "add norm wide",
    "swiglu one row", "swiglu", "swiglu odd", "rope mla", "rope narrow", "rope halves", "rope halves 64", "keys",
    "keys narrow", "loss", "loss odd", "loss one", "adamw", "norms", "schulz small", "schulz ragged", "schulz",
]  # fmt: skip


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("case", CASES)
def test_kernels_agree_with_float64(case: str) -> None:
    from nmoe.bench.elementwise import check

    assert check(case)["bad"] == []


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("case", ["add norm T32768 D768", "keys B16 S2048 H6", "loss T32768 D768 V50304", "adamw"])
def test_kernels_give_the_same_bits_twenty_times(case: str) -> None:
    from nmoe.bench.elementwise import repeat

    assert repeat(case)["differ"] == []


@pytest.mark.gpu
@hopper
def test_a_step_of_norm_and_update_never_waits() -> None:
    """Gradients of new addresses, squared norms, clip, verdict and update with the synchronisation check on."""
    from nmoe.kernels import adamw, grad_norm

    shapes = [(300, 64), (7,)]
    states = [adamw.State(*(torch.ones(s, device="cuda") for _ in range(3)), None, True) for s in shapes]
    group, norms = adamw.FusedAdamW(states), grad_norm.GradNorm([shapes], torch.device("cuda"))
    clip_norm, losses = torch.ones((), dtype=torch.float64, device="cuda"), torch.ones(2, device="cuda")
    factors = adamw.factors(step=1, rate=0.1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0)
    for last in (1.0, torch.nan):
        losses[-1] = last
        before = states[0].master.clone()
        torch.cuda.set_sync_debug_mode("error")
        try:
            grads = [torch.ones(s, device="cuda") for s in shapes]
            clip, verdict = grad_norm.verdict(norms.squared(grads).total, clip_norm, losses)
            group.step(grads, factors, scale=clip, verdict=verdict)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(before, states[0].master) is (last != 1.0)
