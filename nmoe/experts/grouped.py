"""The experts of one layer as one function of autograd, in plain torch.

    y_t = sum over k of w_tk * W_down[e] swiglu(W_gate_up[e] x_t),   e = i_tk

Forward gathers the rows of one segment at a time (an expert's rows of one microbatch, see
`nmoe.rdep.layout`), multiplies, applies SwiGLU, multiplies, and writes the output rows; then each
token's K rows are added in the order of k. The loop is over experts, never over tokens; a segment
is small enough to stay in the cache between its products.

Backward keeps x, the pre-activations, the weights of the pairs and the layout, nothing else. With
G = dy gathered, unweighted, and A the activation:

    dA' = G W_down          dw = <dA', A>             d(pre) = swiglu'(w dA')
    dW_down = G^T (w A)     dW_gate_up = d(pre)^T X   dX = d(pre) W_gate_up

so no output row is stored for the router's gradient. Weight gradients are float32. Every product
is called at the shape of its segment, in the order of the experts: the bits of a segment do not
depend on the others.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nmoe.experts.swiglu import product, swiglu, swiglu_backward
from nmoe.rdep.layout import Layout, combine


class GroupedSwiglu(torch.autograd.Function):
    """`apply(x_TD, weights_TK, w_gate_up_E2FD, w_down_EDF, places)`."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor, places: Layout
    ) -> Tensor:
        rows, hidden = places.token_of_row_R.numel(), x_TD.shape[1]
        pre_R2F = x_TD.new_empty(rows, 2 * w_gate_up_E2FD.shape[2])
        y_RD = x_TD.new_empty(rows, hidden)
        parts = zip(
            *segments(places, places.token_of_row_R, pre_R2F, y_RD),
            w_gate_up_E2FD.flatten(1, 2).unbind(0),
            w_down_EDF.unbind(0),
            strict=True,
        )
        for token_R, pre, y, w_gate_up, w_down in parts:
            if token_R.numel():
                into(pre, x_TD.index_select(0, token_R), w_gate_up.t())
                into(y, swiglu(pre), w_down.t())
        ctx.save_for_backward(x_TD, weights_TK, w_gate_up_E2FD, w_down_EDF, pre_R2F)
        ctx.places = places
        return combine(y_RD, weights_TK, places)

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x_TD, weights_TK, w_gate_up_E2FD, w_down_EDF, pre_R2F = ctx.saved_tensors
        places: Layout = ctx.places
        weight_R = weights_TK.reshape(-1).index_select(0, places.pair_of_row_R)
        d_weight_R = torch.empty_like(weight_R)
        dx_RD = x_TD.new_empty(weight_R.numel(), x_TD.shape[1])
        dw_gate_up_E2FD = torch.empty(w_gate_up_E2FD.shape, dtype=torch.float32, device=x_TD.device)
        dw_down_EDF = torch.empty(w_down_EDF.shape, dtype=torch.float32, device=x_TD.device)
        parts = zip(
            *segments(places, places.token_of_row_R, pre_R2F, weight_R, d_weight_R, dx_RD),
            *(w.flatten(1, 2).unbind(0) for w in (w_gate_up_E2FD, dw_gate_up_E2FD)),
            *(w.unbind(0) for w in (w_down_EDF, dw_down_EDF)),
            strict=True,
        )
        for token_R, pre, weight, d_weight, dx, w_gate_up, dw_gate_up, w_down, dw_down in parts:
            if not token_R.numel():
                dw_gate_up.zero_()
                dw_down.zero_()
                continue
            x_RD, dy_RD = x_TD.index_select(0, token_R), dy_TD.index_select(0, token_R)
            d_act_RF = product(dy_RD, w_down, torch.float32)
            act_RF, d_pre_R2F = swiglu_backward(pre, d_act_RF, weight, d_weight)
            into(dw_down, dy_RD.t(), act_RF)
            into(dw_gate_up, d_pre_R2F.t(), x_RD)
            into(dx, d_pre_R2F, w_gate_up)
        d_weights_TK = d_weight_R.index_select(0, places.row_of_pair_TK.view(-1)).view(weights_TK.shape)
        return combine(dx_RD, None, places), d_weights_TK, dw_gate_up_E2FD, dw_down_EDF, None


def segments(places: Layout, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """For each of `rows`, whose first axis is R: its views of the experts' segments, in order."""
    return (row.split(places.rows) for row in rows)


def into(out_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
    """out = a b, accumulated in float32, rounded once to out's dtype."""
    if out_MN.dtype == torch.float32:
        torch.mm(a_MK.float(), b_KN.float(), out=out_MN)
    else:
        out_MN.copy_(product(a_MK, b_KN, out_MN.dtype))


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

    def forward(self, x_TD: Tensor, weights_TK: Tensor, places: Layout) -> Tensor:
        """y_t = sum over k of w_tk * expert(x_t); x_TD (T, D), weights_TK (T, K) float32; (T, D) in x's dtype."""
        y_TD: Tensor = GroupedSwiglu.apply(x_TD, weights_TK, self.w_gate_up_E2FD, self.w_down_EDF, places)
        return y_TD
