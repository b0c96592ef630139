"""The experts of one layer: as one function of autograd in plain torch, and as the module of every precision.

    y_t = sum over k of w_tk * W_down[e] swiglu(W_gate_up[e] x_t),   e = i_tk

The unit of arithmetic is the segment: an expert's rows of one microbatch (`nmoe.rdep.layout`). Every
product is called at the shape of its segment, so that its bits do not depend on the others. The rest
is done for a chunk of neighbouring segments at once, as many as have `CHUNK_ROWS` rows together:
small experts then cost a few calls each, and the rows of a chunk stay in the cache between its
products. The loop is over experts, never over tokens; each token's K rows are added in the order of k.

Backward keeps x, the pre-activations, the weights of the pairs and the layout, nothing else. With
G = dy gathered, unweighted, and A the activation:

    dA' = G W_down          dw = <dA', A>             d(pre) = swiglu'(w dA')
    dW_down = G^T (w A)     dW_gate_up = d(pre)^T X   dX = d(pre) W_gate_up

so no output row is stored for the router's gradient. Weight gradients are float32.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nmoe.experts.product import into
from nmoe.experts.swiglu import swiglu, swiglu_backward
from nmoe.rdep.layout import Layout, combine
from nmoe.rdep.transport import Places

CHUNK_ROWS = 2048


class GroupedSwiglu(torch.autograd.Function):
    """`apply(x_TD, weights_TK, w_gate_up_E2FD, w_down_EDF, places)`."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor, places: Layout
    ) -> Tensor:
        token_R = places.token_of_row_R
        pre_R2F = x_TD.new_empty(token_R.numel(), 2 * w_gate_up_E2FD.shape[2])
        y_RD = x_TD.new_empty(token_R.numel(), x_TD.shape[1])
        w_gate_up_ED2F, w_down_EFD = w_gate_up_E2FD.flatten(1, 2).transpose(1, 2), w_down_EDF.transpose(1, 2)
        for experts, rows, segments in chunks(places.rows):
            pre = pre_R2F[rows]
            products(pre, x_TD.index_select(0, token_R[rows]), w_gate_up_ED2F[experts], segments)
            products(y_RD[rows], swiglu(pre, segments), w_down_EFD[experts], segments)
        ctx.save_for_backward(x_TD, weights_TK, w_gate_up_E2FD, w_down_EDF, pre_R2F)
        ctx.places = places
        return combine(y_RD, weights_TK, places)

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x_TD, weights_TK, w_gate_up_E2FD, w_down_EDF, pre_R2F = ctx.saved_tensors
        places: Layout = ctx.places
        token_R = places.token_of_row_R
        weight_R = weights_TK.reshape(-1).index_select(0, places.pair_of_row_R)
        d_weight_R = torch.empty_like(weight_R)
        dx_RD = x_TD.new_empty(token_R.numel(), x_TD.shape[1])
        dw_gate_up_E2FD = torch.empty(w_gate_up_E2FD.shape, dtype=torch.float32, device=x_TD.device)
        dw_down_EDF = torch.empty(w_down_EDF.shape, dtype=torch.float32, device=x_TD.device)
        for experts, rows, segments in chunks(places.rows):
            x_RD, dy_RD = x_TD.index_select(0, token_R[rows]), dy_TD.index_select(0, token_R[rows])
            d_act_RF = torch.empty(len(dy_RD), w_down_EDF.shape[2], dtype=torch.float32, device=x_TD.device)
            products(d_act_RF, dy_RD, w_down_EDF[experts], segments)
            act_RF, d_pre_R2F = swiglu_backward(pre_R2F[rows], d_act_RF, weight_R[rows], d_weight_R[rows], segments)
            weight_products(dw_down_EDF[experts], dy_RD, act_RF, segments)
            weight_products(dw_gate_up_E2FD[experts].flatten(1, 2), d_pre_R2F, x_RD, segments)
            products(dx_RD[rows], d_pre_R2F, w_gate_up_E2FD[experts].flatten(1, 2), segments)
        d_weights_TK = d_weight_R.index_select(0, places.row_of_pair_TK.view(-1)).view(weights_TK.shape)
        return combine(dx_RD, None, places), d_weights_TK, dw_gate_up_E2FD, dw_down_EDF, None


def chunks(rows: list[int]) -> Iterator[tuple[slice, slice, list[int]]]:
    """Neighbouring experts of at most CHUNK_ROWS rows together, or one: the experts, their rows, the rows of each."""
    first = start = 0
    while first < len(rows):
        last, stop = first + 1, start + rows[first]
        while last < len(rows) and stop - start + rows[last] <= CHUNK_ROWS:
            stop += rows[last]
            last += 1
        yield slice(first, last), slice(start, stop), rows[first:last]
        first, start = last, stop


def products(out_RN: Tensor, a_RK: Tensor, b_EKN: Tensor, segments: list[int]) -> None:
    """out = a b_e for the rows of each expert e."""
    for out, a, b in zip(out_RN.split(segments), a_RK.split(segments), b_EKN.unbind(), strict=True):
        into(out, a, b)


def weight_products(out_EMN: Tensor, a_RM: Tensor, b_RN: Tensor, segments: list[int]) -> None:
    """out_e = a^T b over the rows of each expert e; 0 where it has none."""
    for out, a, b in zip(out_EMN.unbind(), a_RM.t().split(segments, dim=1), b_RN.split(segments), strict=True):
        into(out, a, b)


class GroupedExperts(torch.nn.Module):
    """E experts' SwiGLU on the rows that a layout gives each of them.

    w_gate_up_E2FD: (E, 2, F, D), index 0 the gate, 1 up; w_down_EDF: (E, D, F); both empty until
    initialised.
    """

    def __init__(self, *, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.w_gate_up_E2FD = torch.nn.Parameter(torch.empty(num_experts, 2, intermediate_size, hidden_size))
        self.w_down_EDF = torch.nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    def forward(self, x_TD: Tensor, weights_TK: Tensor, places: Places) -> Tensor:
        """y_t = sum over k of w_tk * expert(x_t); x_TD (T, D), weights_TK (T, K) float32; (T, D) in x's dtype.

        places: of the kind that x's device has, as its transport makes it.
        """
        swiglu_of = GroupedSwiglu.apply
        if x_TD.device.type != "cpu":
            from nmoe.experts.hopper import HopperSwiglu

            swiglu_of = HopperSwiglu.apply
        y_TD: Tensor = swiglu_of(x_TD, weights_TK, self.w_gate_up_E2FD, self.w_down_EDF, places)
        return y_TD
