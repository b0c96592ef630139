"""Norm, rotary positions, linear maps, embedding, SwiGLU: forward and gradient against float64 autograd."""

import math

import pytest
import torch

from nmoe.model.linear import Embedding, Head, Linear
from nmoe.model.mlp import DenseMlp
from nmoe.model.norm import RmsNorm
from nmoe.model.rope import rotate_halves, rotate_interleaved, table

# Largest error over largest value. float32: a few of its 2^-24. bfloat16: values pass one to three
# roundings of 2^-9 on their way to an output.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prepared(module, dtype):
    for index, parameter in enumerate(module.parameters()):
        parameter.data = randn(*parameter.shape, seed=10 + index).to(dtype)
        parameter.grad_dtype = torch.float32
    return module


def compare(module, x, reference, dtype):
    """Outputs and all gradients of `module` at x, against reference(x, *parameters) in float64."""
    x = x.to(dtype).requires_grad_()
    y = module(x)
    dy = randn(*y.shape, seed=99).to(y.dtype)
    found = (y, *torch.autograd.grad(y, (x, *module.parameters()), dy))
    leaves = [t.detach().double().requires_grad_() for t in (x, *module.parameters())]
    expected = reference(*leaves)
    wanted = (expected, *torch.autograd.grad(expected, leaves, dy.double()))
    for index, (got, want) in enumerate(zip(found, wanted, strict=True)):
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error < TOLERANCE[dtype], f"output {index}: {error:.2e}"
    assert all(gradient.dtype == torch.float32 for gradient in found[2:])


@DTYPES
@pytest.mark.parametrize("size", [5, 24, 193])
def test_norm(dtype, size):
    def reference(x, w):
        return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + 1e-5) * w

    compare(prepared(RmsNorm(size, 1e-5), dtype), randn(3, 7, size, seed=1) * 3, reference, dtype)


def test_norm_of_zeros_is_finite():
    norm = prepared(RmsNorm(8, 1e-6), torch.float32)
    x = torch.zeros(2, 8, requires_grad=True)
    norm(x).sum().backward()
    assert torch.equal(norm(x), torch.zeros(2, 8)) and bool(x.grad.isfinite().all())


@DTYPES
def test_linear(dtype):
    compare(prepared(Linear(24, 37), dtype), randn(2, 9, 24, seed=1), lambda x, w: x @ w.t(), dtype)


@DTYPES
def test_head_gives_float32_logits(dtype):
    compare(prepared(Head(50, 24), dtype), randn(9, 24, seed=1), lambda x, w: x @ w.t(), dtype)
    assert prepared(Head(50, 24), dtype)(randn(2, 24).to(dtype)).dtype == torch.float32


@DTYPES
def test_mlp(dtype):
    def reference(x, gate_up, down):
        gate, up = x @ gate_up[0].t(), x @ gate_up[1].t()
        return (gate * torch.sigmoid(gate) * up) @ down.t()

    compare(prepared(DenseMlp(hidden_size=24, intermediate_size=40), dtype), randn(11, 24, seed=1), reference, dtype)


@DTYPES
def test_embedding_adds_a_row_s_tokens_in_order_in_float32(dtype):
    module = prepared(Embedding(6, 5), dtype)
    ids = torch.tensor([[1, 1, 0, 1], [5, 1, 1, 0]])
    y = module(ids)
    assert torch.equal(y, module.weight_VD[ids])
    dy = (randn(2, 4, 5, seed=2) * 10.0 ** torch.arange(-3, 5).view(2, 4, 1)).to(dtype)
    (gradient,) = torch.autograd.grad(y, module.weight_VD, dy)
    expected = torch.zeros(6, 5)
    for position, row in enumerate(ids.flatten().tolist()):
        expected[row] += dy.flatten(0, 1)[position].float()
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient, expected)


def test_microbatches_add_up_in_float32():
    """bfloat16 weights, gradients of 1, 2^-10 and 2^-10: a bfloat16 sum would stay at 1."""
    module = prepared(Linear(1, 1), torch.bfloat16)
    for value in (1.0, 2.0**-10, 2.0**-10):
        module(torch.full((1, 1), value, dtype=torch.bfloat16)).sum().backward()
    assert module.weight.grad.dtype == torch.float32
    assert module.weight.grad.item() == 1.0 + 2.0**-9


def rotation(dim, theta, position, first, second):
    """The definition, pair by pair: elements first(j), second(j) turn by position * theta^(-2j/dim)."""
    matrix = torch.zeros(dim, dim, dtype=torch.float64)
    for j in range(dim // 2):
        angle = position * theta ** (-2 * j / dim)
        a, b = first(j), second(j)
        matrix[a, a] = matrix[b, b] = math.cos(angle)
        matrix[a, b], matrix[b, a] = -math.sin(angle), math.sin(angle)
    return matrix


@pytest.mark.parametrize("dim", [2, 6, 16])
@pytest.mark.parametrize("convention", ["interleaved", "halves"])
def test_rope_turns_pairs_by_its_definition(convention, dim):
    rotate, first, second = {
        "interleaved": (rotate_interleaved, lambda j: 2 * j, lambda j: 2 * j + 1),
        "halves": (rotate_halves, lambda j: j, lambda j: j + dim // 2),
    }[convention]
    x = randn(2, 50, 3, dim).requires_grad_()
    dy = randn(2, 50, 3, dim, seed=4)
    y = rotate(x, 10000.0)
    (dx,) = torch.autograd.grad(y, x, dy)
    turns = torch.stack([rotation(dim, 10000.0, p, first, second) for p in range(50)])
    expected = torch.einsum("sij,bshj->bshi", turns, x.detach().double())
    expected_dx = torch.einsum("sij,bshi->bshj", turns, dy.double())
    assert (y - expected).abs().max() < 1e-6 and (dx - expected_dx).abs().max() < 1e-6
    half = rotate(x.detach().bfloat16(), 10000.0)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, rotate(x.detach().bfloat16().float(), 10000.0).bfloat16())


def test_rope_angles_are_right_far_out():
    """float32 angles are off by 4e-3 at position 100,000; these are not."""
    position = 100_000
    turn = complex(table(position + 1, 64, 1e4, None, torch.device("cpu"))[position, 1])
    angle = position * 1e4 ** (-2 / 64)
    assert abs(turn - complex(math.cos(angle), math.sin(angle))) < 1e-7


def test_rope_made_under_inference_mode_serves_training():
    with torch.inference_mode():
        rotate_halves(randn(1, 11, 1, 4), 777.0)
        rotate_interleaved(randn(1, 11, 1, 4), 777.0)
    x = randn(1, 11, 1, 4).requires_grad_()
    (rotate_halves(x, 777.0) + rotate_interleaved(x, 777.0)).sum().backward()
    assert x.grad is not None
