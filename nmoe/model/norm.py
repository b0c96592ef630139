"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * w  (Zhang and Sennrich, arXiv 1910.07467).

float32 inside whatever the dtype of x. The gradient is written out, because what autograd composes
from seven elementwise steps reads and writes x that many times; with r = 1 / sqrt(mean(x^2) + eps):

    dx = r * (w dy) - x * r^3 / D * <dy x, w>        dw = sum over rows of r dy x

Both sums are products of dy*x with a vector, in the one order of the product at this shape. On a GPU all this is
`nmoe.kernels.rms_norm`'s, which makes the residual sum before a norm in the same pass.
"""

from typing import Any

import torch
from torch import Tensor


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, w_D: Tensor, eps: float) -> Tensor:
        x32_TD = x_TD.float()
        r_T1 = torch.linalg.vector_norm(x32_TD, dim=1, keepdim=True).square_().div_(x_TD.shape[1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_TD, w_D, r_T1)
        return (x32_TD * r_T1).mul_(w_D).to(x_TD.dtype)

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        x_TD, w_D, r_T1 = ctx.saved_tensors
        x32_TD, dy32_TD, w32_D = x_TD.float(), dy_TD.float(), w_D.float()
        dyx_TD = dy32_TD * x32_TD
        dw_D = torch.mv(dyx_TD.t(), r_T1[:, 0])
        c_T1 = torch.mv(dyx_TD, w32_D)[:, None] * r_T1.pow(3).div_(-x_TD.shape[1])
        dx_TD = torch.mul(dy32_TD, w32_D, out=dyx_TD).mul_(r_T1)
        return dx_TD.addcmul_(x32_TD, c_T1).to(x_TD.dtype), dw_D, None


class RmsNorm(torch.nn.Module):
    """RMSNorm over the last axis; weight_D: (D,)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight_D = torch.nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D); the same shape and dtype."""
        if x.device.type != "cpu":
            from nmoe.kernels.rms_norm import rms_norm

            return rms_norm(x, self.weight_D, self.eps)
        y: Tensor = _RmsNorm.apply(x.reshape(-1, x.shape[-1]), self.weight_D, self.eps)
        return y.view(x.shape)

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x, and its norm; x: (..., D). A GPU adds the two gradients in one pass."""
        if x.device.type != "cpu":
            from nmoe.kernels.rms_norm import pass_rms_norm

            return pass_rms_norm(x, self.weight_D, self.eps)
        return x, self(x)

    def after(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x + y, and its norm; x, y: (..., D), one dtype."""
        if x.device.type != "cpu":
            from nmoe.kernels.rms_norm import add_rms_norm

            return add_rms_norm(x, y, self.weight_D, self.eps)
        s = x + y
        return s, self(s)
