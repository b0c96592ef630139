"""The grouped experts against a float64 loop over tokens, and bit for bit against themselves."""

import pytest
import torch

from nmoe.experts.bf16 import Bf16Experts
from nmoe.experts.fp32 import Fp32Experts
from nmoe.rdep.local import LocalTransport

# Largest error over largest value. float32: sums of some hundred terms lose a few of their 2^-24.
# bfloat16: rows are rounded (2^-9 each) at six places on the way, some of them in one value.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3e-2}
KIND = {torch.float32: Fp32Experts, torch.bfloat16: Bf16Experts}


def make(dtype, experts, hidden, width, seed=0):
    module = KIND[dtype](num_experts=experts, hidden_size=hidden, intermediate_size=width)
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).mul_(hidden**-0.5).to(dtype)
        parameter.grad_dtype = torch.float32
    return module


def inputs(dtype, tokens, hidden, indices_TK, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(tokens, hidden, generator=generator).to(dtype).requires_grad_()
    weights_TK = torch.rand(indices_TK.shape, generator=generator).requires_grad_()
    return x_TD, weights_TK, torch.randn(tokens, hidden, generator=generator).to(dtype)


def forward(module, x_TD, indices_TK, weights_TK):
    transport = LocalTransport()
    return module(x_TD, weights_TK, transport.layout(indices_TK, module.num_experts, 0), transport)


def run(module, x_TD, indices_TK, weights_TK, dy_TD):
    """y, the gradients of x and of the weights, and what is in the matrices' `grad` then."""
    y_TD = forward(module, x_TD, indices_TK, weights_TK)
    dx_TD, dw_TK = torch.autograd.grad(y_TD, (x_TD, weights_TK), dy_TD)
    return (y_TD.detach(), dx_TD, dw_TK, *(parameter.grad.clone() for parameter in module.parameters()))


def clear(module):
    for parameter in module.parameters():
        parameter.grad = None


def reference(module, x_TD, indices_TK, weights_TK, dy_TD):
    x, w = x_TD.detach().double().requires_grad_(), weights_TK.detach().double().requires_grad_()
    gate_up, down = (p.detach().double().requires_grad_() for p in module.parameters())
    rows = []
    for t in range(x.shape[0]):
        y = torch.zeros(x.shape[1], dtype=torch.float64)
        for k, e in enumerate(indices_TK[t].tolist()):
            g, u = gate_up[e, 0] @ x[t], gate_up[e, 1] @ x[t]
            y = y + w[t, k] * (down[e] @ (g * torch.sigmoid(g) * u))
        rows.append(y)
    y_TD = torch.stack(rows)
    return (y_TD.detach(), *torch.autograd.grad(y_TD, (x, w, gate_up, down), dy_TD.double()))


def routing(name, tokens, experts, top_k):
    generator = torch.Generator().manual_seed(5)
    if name == "spread":
        return torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    if name == "first ones only":  # the others get nothing
        return torch.arange(top_k).repeat(tokens, 1)
    return torch.cat([torch.randperm(experts, generator=generator)[None, :top_k] for _ in range(tokens)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "tokens", "experts", "top_k"),
    [("spread", 40, 8, 2), ("spread", 33, 5, 1), ("first ones only", 30, 6, 2), ("any order", 20, 4, 4)],
)
def test_against_float64(dtype, name, tokens, experts, top_k):
    module = make(dtype, experts, 24, 40)
    indices_TK = routing(name, tokens, experts, top_k)
    x_TD, weights_TK, dy_TD = inputs(dtype, tokens, 24, indices_TK)
    found = run(module, x_TD, indices_TK, weights_TK, dy_TD)
    expected = reference(module, x_TD, indices_TK, weights_TK, dy_TD)
    for what, got, want in zip(("y", "dx", "dw", "d gate up", "d down"), found, expected, strict=True):
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error < TOLERANCE[dtype], f"{what}: {error:.2e}"
    assert [g.dtype for g in found] == [dtype, dtype, torch.float32, torch.float32, torch.float32]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_segment_does_not_see_the_others(dtype, threads):
    """The same rows for expert 2, everything else routed otherwise, at widths that put rows off every alignment."""
    torch.set_num_threads(threads)
    module = make(dtype, 6, 37, 51)
    generator = torch.Generator().manual_seed(3)
    mine = torch.rand(200, generator=generator) < 0.3
    routings = []
    for others in ((0, 1), (0, 1, 3, 4, 5), (5,)):
        choice = torch.tensor(others)[torch.randint(len(others), (200,), generator=generator)]
        routings.append(torch.where(mine, 2, choice)[:, None])
    results = []
    for indices_TK in routings:
        x_TD, weights_TK, dy_TD = inputs(dtype, 200, 37, indices_TK)
        clear(module)
        y_TD, dx_TD, dw_TK, d_gate_up, d_down = run(module, x_TD, indices_TK, weights_TK, dy_TD)
        results.append((y_TD[mine], dx_TD[mine], dw_TK[mine], d_gate_up[2], d_down[2], y_TD))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0][:5], other[:5], strict=True))
        assert not torch.equal(results[0][5], other[5])


def test_two_runs_give_the_same_bits():
    torch.set_num_threads(2)
    module = make(torch.float32, 8, 64, 48)
    indices_TK = routing("spread", 500, 8, 3)
    tensors = inputs(torch.float32, 500, 64, indices_TK)
    first = run(module, tensors[0], indices_TK, *tensors[1:])
    clear(module)
    second = run(module, tensors[0], indices_TK, *tensors[1:])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_backward_keeps_no_output_rows():
    """Only x, weights, indices, expert matrices and pre-activations are saved: nothing of shape (T*K, D)."""
    module = make(torch.float32, 4, 20, 33)
    indices_TK = routing("spread", 30, 4, 2)
    x_TD, weights_TK, _ = inputs(torch.float32, 30, 20, indices_TK)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        forward(module, x_TD, indices_TK, weights_TK)
    assert sorted(saved) == sorted([(30, 20), (60,), (60,), (60,), (4, 2, 33, 20), (4, 20, 33), (60, 66)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_microbatches_are_added_in_their_order(dtype):
    """grad is ((g0 + g1) + g2): each pass's gradient computed on its own, the first taken as it is."""
    module = make(dtype, 5, 24, 16)
    parts = []
    for seed in range(3):
        indices_TK = routing("spread", 40, 4, 2) + (seed == 2)  # expert 4 has rows in the last pass alone
        x_TD, weights_TK, dy_TD = inputs(dtype, 40, 24, indices_TK, seed)
        parts.append((indices_TK, x_TD, weights_TK, dy_TD * 10.0 ** (3 * seed)))
    alone = []
    for indices_TK, x_TD, weights_TK, dy_TD in parts:
        clear(module)
        alone.append(run(module, x_TD, indices_TK, weights_TK, dy_TD)[3:])
    clear(module)
    for indices_TK, x_TD, weights_TK, dy_TD in parts:
        together = run(module, x_TD, indices_TK, weights_TK, dy_TD)[3:]
    for found, g0, g1, g2 in zip(together, *alone, strict=True):
        assert torch.equal(found, (g0 + g1) + g2)
        assert not torch.equal(found, g0 + (g1 + g2))
        assert not found[0].eq(0).all() and g0[4].eq(0).all() and torch.equal(found[4], g2[4])
