"""Rotary positions (Su et al., arXiv 2104.09864): pair j of position p turns by p * theta^(-2j/d).

Two conventions say which elements make a pair, and weights trained with one are wrong under the
other:

- interleaved, elements (2j, 2j + 1): DeepSeek's; used by `Mla`.
- halves, elements (j, j + d/2): that of Llama, Qwen and Mixtral; used by `Gqa`.

YaRN (Peng et al., arXiv 2309.00071, section 3.2) stretches a trained context by `factor`: with w_j = theta^(-2j/d)
and a ramp r_j = clamp((j - low) / (high - low), 0, 1) over the pairs, they turn by

    w'_j = (1 - r_j) w_j + r_j w_j / factor

for each position, and cosines and sines are multiplied by `rotary_factor` (section 3.4). The ramp is linear in the
pair, as in the authors' code and every published model; the paper writes it linear in the pair's turns.

The rotation of interleaved pairs is a complex product, whose gradient is the product with the
conjugate. Angles are computed in float64 and rounded once to float32 cosines and sines; the
rotation is float32. On a GPU both are `nmoe.kernels.rope`'s.
"""

import functools
from typing import Any

import attrs
import torch
from torch import Tensor


@attrs.frozen(kw_only=True)
class Yarn:
    """factor > 1. low < high: pairs where the ramp begins and ends. rotary_factor: on cosines and sines."""

    factor: float
    low: float
    high: float
    rotary_factor: float


def frequencies(dim: int, theta: float, scaling: Yarn | None) -> Tensor:
    """By how much each pair turns for a position, in radians: (dim/2,) float64."""
    frequency_J = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if scaling is None:
        return frequency_J
    pair_J = torch.arange(dim // 2, dtype=torch.float64)
    ramp_J = ((pair_J - scaling.low) / (scaling.high - scaling.low)).clamp(0.0, 1.0)
    return frequency_J * (1.0 - ramp_J) + frequency_J / scaling.factor * ramp_J


@functools.lru_cache(maxsize=16)
def table(length: int, dim: int, theta: float, scaling: Yarn | None, device: torch.device) -> Tensor:
    """exp(i p w_j), times the rotary factor, for positions p < length and pairs j: (length, dim/2) complex64."""
    with torch.inference_mode(False):
        angle_SJ = torch.outer(torch.arange(length, dtype=torch.float64), frequencies(dim, theta, scaling))
        factor = 1.0 if scaling is None else scaling.rotary_factor
        return torch.complex((angle_SJ.cos() * factor).float(), (angle_SJ.sin() * factor).float()).to(device)


class _Interleaved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSHR: Tensor, table_SJ: Tensor) -> Tensor:
        ctx.table_SJ = table_SJ
        return turn_interleaved(x_BSHR, table_SJ)

    @staticmethod
    def backward(ctx: Any, dy_BSHR: Tensor) -> tuple[Tensor, None]:
        return turn_interleaved(dy_BSHR, ctx.table_SJ.conj()), None


def turn_interleaved(x_BSHR: Tensor, table_SJ: Tensor) -> Tensor:
    """Each pair (2j, 2j + 1) as a complex number times the table's; shape and dtype of x."""
    pairs = torch.view_as_complex(x_BSHR.float().contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table_SJ[:, None]).flatten(-2).to(x_BSHR.dtype)


def rotate_interleaved(x_BSHR: Tensor, theta: float, scaling: Yarn | None = None) -> Tensor:
    """x_BSHR: (B, S, H, R), position s along S; R even. Returns its shape and dtype."""
    y: Tensor = _Interleaved.apply(x_BSHR, table(x_BSHR.shape[1], x_BSHR.shape[3], theta, scaling, x_BSHR.device))
    return y


class _Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSHR: Tensor, table_SJ: Tensor) -> Tensor:
        ctx.table_SJ = table_SJ
        return turn_halves(x_BSHR, table_SJ.real, table_SJ.imag)

    @staticmethod
    def backward(ctx: Any, dy_BSHR: Tensor) -> tuple[Tensor, None]:
        return turn_halves(dy_BSHR, ctx.table_SJ.real, -ctx.table_SJ.imag), None


def turn_halves(x_BSHR: Tensor, cos_SJ: Tensor, sin_SJ: Tensor) -> Tensor:
    """Each pair (j, j + R/2) turned; shape and dtype of x."""
    half = x_BSHR.shape[-1] // 2
    first, second = x_BSHR[..., :half].float(), x_BSHR[..., half:].float()
    cos_S1J, sin_S1J = cos_SJ[:, None], sin_SJ[:, None]
    y = torch.empty(x_BSHR.shape, dtype=torch.float32, device=x_BSHR.device)
    torch.mul(first, cos_S1J, out=y[..., :half]).addcmul_(second, sin_S1J, value=-1.0)
    torch.mul(second, cos_S1J, out=y[..., half:]).addcmul_(first, sin_S1J)
    return y.to(x_BSHR.dtype)


def rotate_halves(x_BSHR: Tensor, theta: float, scaling: Yarn | None = None) -> Tensor:
    """x_BSHR: (B, S, H, R), position s along S; R even. Returns its shape and dtype."""
    table_SJ = table(x_BSHR.shape[1], x_BSHR.shape[3], theta, scaling, x_BSHR.device)
    if x_BSHR.device.type != "cpu":
        from nmoe.kernels.rope import rope

        return rope(x_BSHR, table_SJ, interleaved=False)
    y: Tensor = _Halves.apply(x_BSHR, table_SJ)
    return y
