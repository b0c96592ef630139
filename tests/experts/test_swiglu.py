"""SwiGLU's written-out gradient against float64 autograd, at the ends of the range too."""

import torch

from nmoe.experts.product import product
from nmoe.experts.swiglu import swiglu, swiglu_backward


def test_against_float64_autograd():
    generator = torch.Generator().manual_seed(0)
    pre_R2F = torch.randn(9, 40, generator=generator) * 6
    pre_R2F[0] = torch.linspace(-120, 120, 40)
    d_act_RF, weight_R = torch.randn(9, 20, generator=generator), torch.rand(9, generator=generator)
    reference = pre_R2F.double().requires_grad_()
    scale = weight_R.double().requires_grad_()
    gate, up = reference.chunk(2, dim=1)
    expected = gate * torch.sigmoid(gate) * up
    d_pre, d_scale = torch.autograd.grad(expected * scale[:, None], (reference, scale), d_act_RF.double())
    d_weight_R = torch.empty(9)
    act_RF, d_pre_R2F = swiglu_backward(pre_R2F, d_act_RF.clone(), weight_R, d_weight_R)
    torch.testing.assert_close(swiglu(pre_R2F).double(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(act_RF.double(), (expected * scale[:, None]).detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(d_pre_R2F.double(), d_pre, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d_weight_R.double(), d_scale, rtol=1e-5, atol=1e-4)


def test_without_weights_it_is_weight_one():
    generator = torch.Generator().manual_seed(1)
    pre_R2F, d_act_RF = torch.randn(5, 16, generator=generator), torch.randn(5, 8, generator=generator)
    plain = swiglu_backward(pre_R2F, d_act_RF.clone(), None, None)
    weighted = swiglu_backward(pre_R2F, d_act_RF.clone(), torch.ones(5), torch.empty(5))
    assert all(torch.equal(a, b) for a, b in zip(plain, weighted, strict=True))


def test_a_bfloat16_product_is_rounded_once():
    """4096 ones sum exactly in float32; a bfloat16 accumulator stops at 256."""
    ones = torch.ones(2, 4096, dtype=torch.bfloat16)
    assert product(ones, ones.t(), torch.bfloat16).tolist() == [[4096.0] * 2] * 2
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(33, 70, generator=generator).bfloat16() for _ in range(2))
    exact = a.double() @ b.double().t()
    assert (product(a, b.t(), torch.float32) - exact).abs().max() < 1e-5
    assert torch.equal(product(a, b.t(), torch.bfloat16), product(a, b.t(), torch.float32).bfloat16())
