"""Attention in blocks against the whole square in float64, masked by brute force."""

import pytest
import torch

from nmoe.model.attention import attend, blocks, document_starts

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


def with_extras(length, dtype, heads=3, batch=2):
    """Documents of uneven lengths, one of a single token, others in each row; sinks from far below to above scores."""
    generator = torch.Generator().manual_seed(length)
    opens_BS = torch.rand(batch, length, generator=generator) < 0.07
    opens_BS[0, length // 2 : length // 2 + 2] = True
    return opens_BS.long().cumsum(1), torch.linspace(-30.0, 9.0, heads).to(dtype)


def reference_with_extras(q, k, v, dy, window, document_ids_BS, sink_H):
    """The whole square in float64, with a key of value 0 for the sink."""
    leaves = [t.double().requires_grad_() for t in (q, k, v, sink_H)]
    length = q.shape[2]
    score = leaves[0] @ leaves[1].transpose(2, 3) / q.shape[3] ** 0.5
    position = torch.arange(length)
    ahead = position[None] - position[:, None]
    allowed = (ahead <= 0) & (ahead > -(window or length))
    allowed = allowed[None, None] & (document_ids_BS[:, None, :, None] == document_ids_BS[:, None, None, :])
    sink = leaves[3][None, :, None, None].expand(*score.shape[:3], 1)
    p = torch.cat([score.masked_fill(~allowed, -torch.inf), sink], dim=3).softmax(dim=3)[..., :-1]
    y = p @ leaves[2]
    return (y.detach(), *torch.autograd.grad(y, leaves, dy.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("length", "window"), [(200, None), (200, 16), (65, 5), (1, None), (128, 70)])
def test_documents_and_sinks_against_the_whole_square(length, window, dtype):
    given = tensors(length, dtype, heads=9)  # two groups of heads, cut within a sequence
    document_ids_BS, sink_H = with_extras(length, dtype, heads=9)
    leaves = [t.detach().requires_grad_() for t in (*given[:3], sink_H)]
    y = attend(*leaves[:3], window, document_starts(document_ids_BS), leaves[3])
    leaves[3].grad_dtype = torch.float32
    y.backward(given[3])
    found = (y.detach(), *(leaf.grad for leaf in leaves))
    wanted = reference_with_extras(*given, window, document_ids_BS, sink_H)
    for what, got, want in zip(("y", "dq", "dk", "dv", "dsink"), found, wanted, strict=True):
        error = (got.double() - want).abs().max() / want.abs().max().clamp_min(1e-3)
        assert error < TOLERANCE[dtype], f"{what}: {error:.2e}"


def test_sinks_against_gpt_oss():
    """transformers' eager attention of GPT-OSS, with its window mask: outputs and every gradient."""
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    length, window, heads = 70, 9, 4
    q, k, v, dy = tensors(length, torch.float32, heads=heads, widths=(16, 16))
    sinks = torch.tensor([-1.0, 0.5, 2.0, 4.0])
    ahead = torch.arange(length)[None] - torch.arange(length)[:, None]
    hidden = torch.zeros(1, 1, length, length).masked_fill_((ahead > 0) | (ahead <= -window), -torch.inf)
    results = []
    for ours in (True, False):
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v, sinks)]
        if ours:
            y = attend(*leaves[:3], window, None, leaves[3])
        else:
            module = torch.nn.Module()
            module.num_key_value_groups, module.sinks = 1, leaves[3]
            y, _ = eager_attention_forward(module, *leaves[:3], hidden, scaling=16**-0.5)
            y = y.transpose(1, 2)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, dy)))
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() <= 2e-6 * want.abs().max()


def test_a_document_is_as_if_alone():
    """With the mask, each document's rows and gradients are those of a sequence of its own."""
    given = tensors(150, torch.float32, batch=1)
    document_ids_BS = torch.cat([torch.full((n,), i) for i, n in enumerate((40, 1, 70, 39))])[None]
    leaves = [t.detach().requires_grad_() for t in given[:3]]
    y = attend(*leaves, 30, document_starts(document_ids_BS))
    together = (y.detach(), *torch.autograd.grad(y, leaves, given[3]))
    start = 0
    for length in (40, 1, 70, 39):
        part = slice(start, start + length)
        alone = run(*(t[:, :, part] for t in given), 30)
        for got, want in zip(together, alone, strict=True):
            assert (got[:, :, part] - want).abs().max() <= 3e-6 * want.abs().max()
        start += length
