"""The experts of one layer on a Hopper GPU: `nmoe.kernels.moe` as one function of autograd.

The same mathematics as `nmoe.experts.grouped`, and the same saved tensors: x, the pre-activations, the
weights of the pairs and the layout. bfloat16 rows and matrices; weight gradients float32.
"""

from typing import Any

import torch
from torch import Tensor

from nmoe.kernels.layout import Layout
from nmoe.kernels.moe import Saved, moe_backward, moe_forward


class HopperSwiglu(torch.autograd.Function):
    """`apply(x_TD, weights_TK, w_gate_up_E2FD, w_down_EDF, places)`."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor, places: Layout
    ) -> Tensor:
        y_TD, saved = moe_forward(x_TD, places, weights_TK, w_gate_up_E2FD, w_down_EDF)
        ctx.save_for_backward(x_TD, weights_TK, w_gate_up_E2FD, w_down_EDF, saved.h_2RF)
        ctx.places = places
        return y_TD

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x_TD, weights_TK, w_gate_up_E2FD, w_down_EDF, h_2RF = ctx.saved_tensors
        saved = Saved(h_2RF, weights_TK, ctx.places)
        return *moe_backward(dy_TD.contiguous(), x_TD, w_gate_up_E2FD, w_down_EDF, saved), None
