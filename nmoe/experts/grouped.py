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
        experts, _, width, hidden = w_gate_up_E2FD.shape
        rows = places.pair_of_row_R.numel()
        pre_R2F = x_TD.new_empty(rows, 2 * width)
        y_RD = x_TD.new_empty(rows, hidden)
        for e in range(experts):
            start, stop = places.segments[e]
            if start == stop:
                continue
            x_RD = x_TD.index_select(0, places.token_of_row_R[start:stop])
            into(pre_R2F[start:stop], x_RD, w_gate_up_E2FD[e].view(2 * width, hidden).t())
            into(y_RD[start:stop], swiglu(pre_R2F[start:stop]), w_down_EDF[e].t())
        ctx.save_for_backward(x_TD, weights_TK, w_gate_up_E2FD, w_down_EDF, pre_R2F)
        ctx.places = places
        return combine(y_RD, weights_TK, places)

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x_TD, weights_TK, w_gate_up_E2FD, w_down_EDF, pre_R2F = ctx.saved_tensors
        places: Layout = ctx.places
        experts, _, width, hidden = w_gate_up_E2FD.shape
        weight_R = weights_TK.reshape(-1).index_select(0, places.pair_of_row_R)
        d_weight_R = torch.empty_like(weight_R)
        dx_RD = x_TD.new_empty(places.pair_of_row_R.numel(), hidden)
        dw_gate_up_E2FD = torch.empty(w_gate_up_E2FD.shape, dtype=torch.float32, device=x_TD.device)
        dw_down_EDF = torch.empty(w_down_EDF.shape, dtype=torch.float32, device=x_TD.device)
        for e in range(experts):
            start, stop = places.segments[e]
            if start == stop:
                dw_gate_up_E2FD[e].zero_()
                dw_down_EDF[e].zero_()
                continue
            token_R = places.token_of_row_R[start:stop]
            x_RD, dy_RD = x_TD.index_select(0, token_R), dy_TD.index_select(0, token_R)
            d_act_RF = product(dy_RD, w_down_EDF[e], torch.float32)
            act_RF, d_pre_R2F, d_weight = swiglu_backward(pre_R2F[start:stop], d_act_RF, weight_R[start:stop])
            assert d_weight is not None
            d_weight_R[start:stop] = d_weight
            into(dw_down_EDF[e], dy_RD.t(), act_RF)
            into(dw_gate_up_E2FD[e].view(2 * width, hidden), d_pre_R2F.t(), x_RD)
            into(dx_RD[start:stop], d_pre_R2F, w_gate_up_E2FD[e].view(2 * width, hidden))
        d_weights_TK = torch.empty_like(weights_TK)
        d_weights_TK.view(-1)[places.pair_of_row_R] = d_weight_R
        return combine(dx_RD, None, places), d_weights_TK, dw_gate_up_E2FD, dw_down_EDF, None


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
