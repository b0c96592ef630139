"""Products, and the one place that knows how each kind of device multiplies.

Operands are float32 or bfloat16, sums are float32, and a result is rounded once to the dtype asked for.

On the CPU operands are widened to float32 first, because CPU products of bfloat16 differ by machine
in how they accumulate and cannot return float32. On a GPU bfloat16 meets bfloat16 in the tensor cores:
an operand that is float32 where the other is bfloat16 is rounded to it. cuBLAS gives the same bits
for the same shape, with the workspace that `nmoe.platform` sets.
"""

import torch
from torch import Tensor


def product(a_MK: Tensor, b_KN: Tensor, dtype: torch.dtype) -> Tensor:
    """a b, accumulated in float32 and rounded once to `dtype`; a_MK, b_KN: float32 or bfloat16, on one device."""
    if a_MK.device.type == "cpu":
        return torch.mm(a_MK.float(), b_KN.float()).to(dtype)
    if torch.bfloat16 in (a_MK.dtype, b_KN.dtype):
        a_MK, b_KN = a_MK.bfloat16(), b_KN.bfloat16()
    return torch.mm(a_MK, b_KN) if dtype == a_MK.dtype else torch.mm(a_MK, b_KN, out_dtype=dtype)


def add_product(out_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
    """out += a b, all of one dtype, rounded to it: on a GPU once, in the product; on the CPU the product before."""
    if out_MN.device.type == "cpu":
        out_MN.add_(product(a_MK, b_KN, out_MN.dtype))
    else:
        torch.addmm(out_MN, a_MK, b_KN, out=out_MN)


def operand(x: Tensor) -> Tensor:
    """x as the CPU's products read it: what several products share is then widened once, not in each."""
    return x.float()


def into(out_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
    """out = a b on the CPU, as `product` in out's dtype."""
    if out_MN.dtype == torch.float32:
        torch.mm(a_MK.float(), b_KN.float(), out=out_MN)
    else:
        out_MN.copy_(product(a_MK, b_KN, out_MN.dtype))


def accumulate(out_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
    """out += a b on the CPU, for float32 out."""
    out_MN.addmm_(a_MK.float(), b_KN.float())
