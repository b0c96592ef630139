"""The chunked loss against torch's cross-entropy in float64, and what it never makes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nmoe.model.loss import linear_cross_entropy, token_losses

# As in the other tests: a few of 2^-24; bfloat16 inputs are exact and dh is rounded once to 2^-9.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}


def given(tokens, dtype, hidden=24, vocab=50):
    generator = torch.Generator().manual_seed(tokens)
    h = (torch.randn(tokens, hidden, generator=generator) * 2).to(dtype).requires_grad_()
    w = torch.randn(vocab, hidden, generator=generator).to(dtype).requires_grad_()
    w.grad_dtype = torch.float32
    return h, w, torch.randint(0, vocab, (tokens,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "chunk"), [(64, 64), (64, 16), (65, 16), (1, 16), (30, 1000), (7, 1)])
def test_against_float64_cross_entropy(tokens, chunk, dtype):
    h, w, targets = given(tokens, dtype)
    loss = linear_cross_entropy(h, w, targets, chunk_tokens=chunk)
    found = torch.autograd.grad(loss / 7, (h, w))
    h64, w64 = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(h64 @ w64.t(), targets, reduction="none")
    wanted = torch.autograd.grad(expected.sum() / 7, (h64, w64))
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert abs(loss.item() - expected.sum().item()) <= 2e-6 * expected.sum().item()
    for got, want in zip(found, wanted, strict=True):
        assert (got - want).abs().max() / want.abs().max() < TOLERANCE[dtype]
    assert [g.dtype for g in found] == [dtype, torch.float32]
    each = token_losses(h, w, targets, chunk_tokens=chunk)
    assert not each.requires_grad
    assert (each - expected.detach()).abs().max() < 1e-5


def test_without_gradient_it_is_the_same_loss():
    h, w, targets = given(65, torch.float32)
    loss = linear_cross_entropy(h, w, targets, chunk_tokens=16)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(h, w, targets, chunk_tokens=16), loss.detach())
    assert torch.equal(token_losses(h, w, targets, chunk_tokens=16).double().sum().float(), loss.detach())


def test_an_extreme_logit_is_finite():
    h, w = torch.full((2, 1), 1e4, requires_grad=True), torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss = linear_cross_entropy(h, w, torch.tensor([1, 0]), chunk_tokens=2)
    assert loss.item() == 2e4
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(loss, (h, w)))


def test_a_target_outside_the_vocabulary_is_an_error():
    h, w, targets = given(4, torch.float32)
    targets[2] = 50
    with pytest.raises((IndexError, RuntimeError), match=r"index 50 is out of bounds|out of bounds"):
        linear_cross_entropy(h, w, targets, chunk_tokens=4)


class Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_the_whole_logits_never_exist():
    h, w, targets = given(512, torch.float32, hidden=4, vocab=300)
    with Largest() as seen:
        linear_cross_entropy(h, w, targets, chunk_tokens=32).backward()
        token_losses(h, w, targets, chunk_tokens=32)
    assert seen.numel == 32 * 300
