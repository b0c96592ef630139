"""The kernels' references mean what the model computes on the CPU, and its specs know what the kernels take."""

import pytest
import torch
from torch import Tensor

from nmoe.experts.bf16 import Bf16Experts
from nmoe.experts.fp32 import Fp32Experts
from nmoe.kernels import launch
from nmoe.kernels.attention import attention_reference
from nmoe.model.attention import attend
from nmoe.rdep.local import LocalTransport
from nmoe.registry import hopper

# Largest error of a norm. float32: sums of a few hundred numbers. bfloat16: four roundings of 2^-9 between input and
# gradient, of every element.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 6e-3}


def error(found: Tensor, wanted: Tensor) -> float:
    return float(((found.double() - wanted).norm() / wanted.norm()).detach())


def normal(*size: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def routing(tokens: int, experts: int, top_k: int) -> Tensor:
    """Distinct experts for each token; expert 2 gets none."""
    random_TE = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(9))
    random_TE[:, 2] = -1.0
    return random_TE.topk(top_k, dim=1).indices


def test_specs_and_kernels_agree_on_widths():
    assert (hopper.QUERY_WIDTHS, hopper.VALUE_WIDTHS) == (launch.QUERY_WIDTHS, launch.VALUE_WIDTHS)
    assert (hopper.ROUTER_EXPERTS, hopper.ROUTER_CHOSEN) == (launch.ROUTER_EXPERTS, launch.ROUTER_CHOSEN)
    assert pytest.importorskip("nmoe.kernels.rms_norm").WIDEST == hopper.NORM_WIDTH


def test_both_layouts_put_a_pair_in_one_row():
    layout_reference = pytest.importorskip("nmoe.kernels.layout").layout_reference
    expert_TK = routing(300, 7, 3)
    transport, kernels = LocalTransport(), layout_reference(expert_TK, 7)
    places = transport.layout(expert_TK, 7, 0)
    received = transport.dispatch(torch.empty(300, 1), torch.empty(300, 3), places)
    assert torch.equal(places.row_TK, kernels.row_TK.long())
    assert torch.equal(received.pair_R, kernels.pair_R.long())
    assert torch.equal(received.token_R, kernels.token_R.long())
    assert places.segments_LN.flatten().tolist() == kernels.offsets_E1.diff().tolist()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_experts_mean_the_kernels_reference(dtype):
    moe_reference = pytest.importorskip("nmoe.kernels.moe").moe_reference
    T, D, F, E, K = 130, 48, 40, 6, 3
    kind = {torch.float32: Fp32Experts, torch.bfloat16: Bf16Experts}[dtype]
    experts = kind(num_experts=E, hidden_size=D, intermediate_size=F)
    weights = [normal(E, 2, F, D, seed=1, dtype=dtype) * D**-0.5, normal(E, D, F, seed=2, dtype=dtype) * F**-0.5]
    for parameter, weight in zip(experts.parameters(), weights, strict=True):
        parameter.data = weight
        parameter.grad_dtype = torch.float32
    x_TD = normal(T, D, seed=3, dtype=dtype).requires_grad_()
    weights_TK = normal(T, K, seed=4).sigmoid().requires_grad_()
    expert_TK, dy_TD = routing(T, E, K), normal(T, D, seed=5, dtype=dtype)
    transport = LocalTransport()
    y_TD = experts(x_TD, weights_TK, transport.layout(expert_TK, E, 0), transport)
    leaves = [t.detach().double().requires_grad_() for t in (x_TD, weights_TK, *experts.parameters())]
    wanted_TD = moe_reference(leaves[0], expert_TK, leaves[1], *leaves[2:])
    assert error(y_TD, wanted_TD) < TOLERANCE[dtype]
    y_TD.backward(dy_TD)
    wanted = torch.autograd.grad(wanted_TD, leaves, dy_TD.double())
    for tensor, gradient in zip((x_TD, weights_TK, *experts.parameters()), wanted, strict=True):
        assert tensor.grad is not None
        assert error(tensor.grad, gradient) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("window", "documents", "sinks"), [(None, False, False), (50, True, True), (None, True, False)]
)
def test_attention_means_the_kernels_reference(window, documents, sinks):
    B, H, G, S, Q, V = 2, 6, 2, 150, 24, 16
    q, k, v = (normal(B, h, S, x, seed=s).requires_grad_() for s, (h, x) in enumerate([(H, Q), (G, Q), (G, V)], 20))
    sink_H = normal(H, seed=30).requires_grad_() if sinks else None
    start_BS = torch.cat([torch.zeros(B, 70), torch.full((B, S - 70), 70)], dim=1).long() if documents else None
    inputs = [t for t in (q, k, v, sink_H) if t is not None]
    dy = normal(B, H, S, V, seed=31)
    y = attend(q, k, v, window, start_BS, sink_H)
    leaves = [t.detach().double().requires_grad_() for t in inputs]
    wanted_y, _ = attention_reference(
        *leaves[:3], window=window, start_BS=start_BS, sink_H=leaves[3] if sinks else None
    )
    assert error(y, wanted_y) < TOLERANCE[torch.float32]
    found, wanted = torch.autograd.grad(y, inputs, dy), torch.autograd.grad(wanted_y, leaves, dy.double())
    assert max(map(error, found, wanted)) < TOLERANCE[torch.float32]
