"""A kernel as `nmoe.bench.elementwise` sees it: results, float64 meaning, facts of bits, timed parts, peers."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

DEVICE = "cuda"
BF16 = 4e-3
"""Relative error, in the 2-norm, of a tensor rounded to bf16 once: 2^-9 an element at most, 1.7e-3 together."""
FP32 = 5e-6
"""Of a tensor computed in float32 from exact inputs, by sums of at most 1e5 terms."""


class Peer(NamedTuple):
    """function(*leaves), or its gradient for `given`; also run through torch.compile where `compiles`."""

    function: Callable[..., Any]
    leaves: Sequence[Tensor]
    given: Any = None
    compiles: bool = True


class Part(NamedTuple):
    """Something that is timed: ours, the bytes that it must move, its FLOPs, and who else does it."""

    name: str
    call: Callable[[], object]
    bytes: float
    flops: float
    peers: dict[str, Peer]


class Case(NamedTuple):
    """ours, exact: results of the kernels and in float64, by name. limits: the relative error that is right.

    facts: what must hold bit for bit. parts: what is timed.
    """

    ours: Callable[[], dict[str, Tensor]]
    exact: Callable[[], dict[str, Tensor]]
    limits: dict[str, float]
    facts: Callable[[], dict[str, bool]]
    parts: Callable[[], list[Part]]


def normals() -> Callable[..., Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(1)

    def normal(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(size, generator=generator, device=DEVICE).to(dtype)

    return normal


def leaves_of(*tensors: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
