"""SwiGLU and its gradient, in plain torch.

    a = silu(g) * u,   silu(g) = g * sigmoid(g)          (Shazeer, arXiv 2002.05202)

The pre-activations g and u come from one product, side by side in a row: (R, 2F), gate first.
Only they are saved; the activation is computed again in backward, which is cheaper than to store
it. Whatever the storage dtype, everything between two products is float32: a value is rounded to
the storage dtype once, where a product reads or saves it. So bf16 differs from fp32 by those
roundings alone.
"""

import torch
from torch import Tensor


def swiglu(pre_R2F: Tensor, segments: list[int] | None = None) -> Tensor:
    """silu(g) * u for pre_R2F = [g | u] of shape (R, 2F); (R, F) in its dtype.

    segments: rows of each segment, whose bits must not depend on the others; None for one.
    """
    gate_RF, up_RF = (half.float() for half in pre_R2F.chunk(2, dim=1))
    return sigmoid(gate_RF, segments).mul_(gate_RF).mul_(up_RF).to(pre_R2F.dtype)


def sigmoid(gate_RF: Tensor, segments: list[int] | None) -> Tensor:
    """A call for each segment: torch's vector loop and its tail are two codes that can differ in the last bit.

    Everything else in this module is correctly rounded, or a sum over a row, so that where a call begins is no matter.
    """
    out_RF = torch.empty(gate_RF.shape, dtype=torch.float32, device=gate_RF.device)
    segments = segments or [len(gate_RF)]
    for gate, out in zip(gate_RF.split(segments), out_RF.split(segments), strict=True):
        torch.sigmoid(gate, out=out)
    return out_RF


def swiglu_backward(
    pre_R2F: Tensor,
    d_act_RF: Tensor,
    weight_R: Tensor | None = None,
    d_weight_R: Tensor | None = None,
    segments: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient of w * swiglu(pre), with what the weight products need.

    With s = sigmoid(g): silu'(g) = s + g s (1 - s), which is silu(g) taken the way s towards 1.

    pre_R2F: (R, 2F), what `swiglu` read. d_act_RF: (R, F) float32, the gradient before the row
    weight; it is overwritten. weight_R: (R,) float32, each row's router weight, or None for 1.
    d_weight_R: (R,) float32, where <d_act, swiglu(pre)> is written; None where weight_R is.
    segments: as in `swiglu`.

    Returns
    act_RF: float32, w * swiglu(pre) (rounded to pre's dtype before the weight, as forward did).
    d_pre_R2F: (R, 2F) in pre's dtype.
    """
    gate_RF, up_RF = (half.float() for half in pre_R2F.chunk(2, dim=1))
    sigmoid_RF = sigmoid(gate_RF, segments)
    silu_RF = gate_RF * sigmoid_RF
    act_RF = (silu_RF * up_RF).to(pre_R2F.dtype).float()
    if weight_R is not None and d_weight_R is not None:
        torch.linalg.vecdot(d_act_RF, act_RF, out=d_weight_R)
        act_RF.mul_(weight_R[:, None])
        d_act_RF.mul_(weight_R[:, None])
    d_pre_R2F = torch.empty_like(pre_R2F)
    d_gate_RF, d_up_RF = d_pre_R2F.chunk(2, dim=1)
    torch.mul(d_act_RF, silu_RF, out=d_up_RF)
    slope_RF = torch.lerp(silu_RF, silu_RF.new_ones(()), sigmoid_RF, out=sigmoid_RF)
    torch.mul(d_act_RF.mul_(up_RF), slope_RF, out=d_gate_RF)
    return act_RF, d_pre_R2F
