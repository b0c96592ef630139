"""The experts of one layer on a Hopper GPU: `nmoe.kernels.moe` as one function of autograd.

The same mathematics as `nmoe.experts.grouped`, and the same saved tensors: x, the pre-activations, the
weights of the pairs and the layout. bfloat16 rows and matrices; weight gradients float32.

Backward adds to the matrices' `grad` itself, and returns none for them: the products that make a microbatch's
gradient begin with the sum of those before it, so a pass over both is saved.
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
        ctx.matrices, ctx.places = (w_gate_up_E2FD, w_down_EDF), places
        return y_TD

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TK, w_gate_up_E2FD, w_down_EDF, h_2RF = ctx.saved_tensors
        gate_up, down = ctx.matrices
        grads = None if gate_up.grad is None else (gate_up.grad, down.grad)
        saved = Saved(h_2RF, weights_TK, ctx.places)
        found = moe_backward(dy_TD.contiguous(), x_TD, w_gate_up_E2FD, w_down_EDF, saved, grads=grads)
        gate_up.grad, down.grad = found.w_gate_up_E2FD, found.w_down_EDF
        return found.x_TD, found.weight_TK, None, None, None
