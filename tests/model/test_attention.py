"""Attention in blocks against the whole square in float64, masked by brute force."""

import pytest
import torch

from nmoe.model.attention import attend, blocks

# float32: a softmax over some hundred scores and two products lose a few of 2^-24.
# bfloat16: inputs are exact, only outputs and gradients are rounded, 2^-9 each.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 6e-3}

CASES = [
    (200, None), (1, None), (64, None), (65, None), (63, 5), (200, 1), (200, 2), (200, 16), (200, 63),
    (200, 64), (200, 65), (200, 130), (200, 199), (200, 200), (200, 5000), (128, 64),
]  # fmt: skip


def tensors(length, dtype, heads=3, batch=2, widths=(12, 20)):
    generator = torch.Generator().manual_seed(length)
    q, k = (torch.randn(batch, heads, length, widths[0], generator=generator) * 2 for _ in "qk")
    v, dy = (torch.randn(batch, heads, length, widths[1], generator=generator) for _ in "vy")
    return [t.to(dtype) for t in (q, k, v, dy)]


def run(q, k, v, dy, window):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    y = attend(*leaves, window)
    return (y.detach(), *torch.autograd.grad(y, leaves, dy))


def reference(q, k, v, dy, window):
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    score = leaves[0] @ leaves[1].transpose(2, 3) / q.shape[3] ** 0.5
    length = q.shape[2]
    allowed = torch.tensor(
        [[j <= i and (window is None or j > i - window) for j in range(length)] for i in range(length)]
    )
    y = score.masked_fill(~allowed, -torch.inf).softmax(dim=3) @ leaves[2]
    return (y.detach(), *torch.autograd.grad(y, leaves, dy.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("length", "window"), CASES)
def test_against_the_whole_square(length, window, dtype):
    given = tensors(length, dtype)
    for what, got, want in zip(("y", "dq", "dk", "dv"), run(*given, window), reference(*given, window), strict=True):
        error = (got.double() - want).abs().max() / want.abs().max().clamp_min(1e-3)
        assert got.dtype == dtype
        assert error < TOLERANCE[dtype], f"{what}: {error:.2e}"


@pytest.mark.parametrize("widths", [(192, 128), (128, 128), (48, 32), (16, 64)])
def test_key_and_value_widths(widths):
    given = tensors(70, torch.float32, heads=2, batch=1, widths=widths)
    for got, want in zip(run(*given, None), reference(*given, None), strict=True):
        assert (got - want).abs().max() / want.abs().max() < TOLERANCE[torch.float32]


@pytest.mark.parametrize(("length", "window"), [(200, None), (200, 40)])
def test_two_runs_give_the_same_bits(length, window):
    torch.set_num_threads(2)
    given = tensors(length, torch.float32, heads=4)
    first, second = (run(*given, window) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_later_token_changes_nothing_before_it():
    q, k, v, dy = tensors(150, torch.float32)
    for window in (None, 30):
        before = run(q, k, v, dy, window)[0]
        for t in (q, k, v):
            t[:, :, 100:] += 1.0
        after = run(q, k, v, dy, window)[0]
        assert torch.equal(before[:, :, :100], after[:, :, :100])
        assert not torch.equal(before[:, :, 100:], after[:, :, 100:])


def test_large_scores_do_not_overflow():
    q, k, v, dy = tensors(80, torch.float32)
    assert all(bool(t.isfinite().all()) for t in run(q * 1e4, k * 1e4, v, dy, 20))


def test_a_window_s_work_grows_with_the_length_times_the_window():
    pairs = {
        length: sum((r.stop - r.start) * (k.stop - k.start) for r, k in blocks(length, 100)) for length in (4096, 8192)
    }
    assert pairs[4096] <= 4096 * (100 + 64 + 16)
    assert pairs[8192] <= 2.1 * pairs[4096]
