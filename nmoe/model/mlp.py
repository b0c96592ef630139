"""The dense SwiGLU: y = W_down (silu(W_gate x) * W_up x)  (Shazeer, arXiv 2002.05202).

Gate and up are one product. Only x and the pre-activations are saved for backward. Between the products a GPU runs
one kernel (`nmoe.kernels.swiglu`), forward and backward.
"""

from typing import Any

import torch
from torch import Tensor

from nmoe.experts.product import product
from nmoe.experts.swiglu import swiglu, swiglu_backward


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, w_gate_up_2FD: Tensor, w_down_DF: Tensor) -> Tensor:
        pre_T2F = product(x_TD, w_gate_up_2FD.flatten(0, 1).t(), x_TD.dtype)
        ctx.save_for_backward(x_TD, w_gate_up_2FD, w_down_DF, pre_T2F)
        return product(activation(pre_T2F), w_down_DF.t(), x_TD.dtype)

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_TD, w_gate_up_2FD, w_down_DF, pre_T2F = ctx.saved_tensors
        act_TF, d_pre_T2F = activation_backward(pre_T2F, product(dy_TD, w_down_DF, torch.float32))
        dw_down_DF = product(dy_TD.t(), act_TF, torch.float32)
        dw_gate_up_2FD = product(d_pre_T2F.t(), x_TD, torch.float32).view(w_gate_up_2FD.shape)
        return product(d_pre_T2F, w_gate_up_2FD.flatten(0, 1), x_TD.dtype), dw_gate_up_2FD, dw_down_DF


def activation(pre_T2F: Tensor) -> Tensor:
    """silu(g) * u for pre_T2F = [g | u], (T, 2F); (T, F) in its dtype."""
    if pre_T2F.device.type == "cpu":
        return swiglu(pre_T2F)
    from nmoe.kernels import swiglu as kernels

    return kernels.swiglu(pre_T2F)


def activation_backward(pre_T2F: Tensor, d_act_TF: Tensor) -> tuple[Tensor, Tensor]:
    """The activation again, and the gradient of pre_T2F in its dtype; d_act_TF: (T, F) float32, overwritten."""
    if pre_T2F.device.type == "cpu":
        return swiglu_backward(pre_T2F, d_act_TF)
    from nmoe.kernels import swiglu as kernels

    return kernels.swiglu_backward(pre_T2F, d_act_TF)


class DenseMlp(torch.nn.Module):
    """SwiGLU; w_gate_up_2FD: (2, F, D), index 0 the gate, 1 up; w_down_DF: (D, F)."""

    def __init__(self, *, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.w_gate_up_2FD = torch.nn.Parameter(torch.empty(2, intermediate_size, hidden_size))
        self.w_down_DF = torch.nn.Parameter(torch.empty(hidden_size, intermediate_size))

    def forward(self, x_TD: Tensor) -> Tensor:
        """x_TD: (T, D); (T, D) in its dtype."""
        y_TD: Tensor = _Swiglu.apply(x_TD, self.w_gate_up_2FD, self.w_down_DF)
        return y_TD
