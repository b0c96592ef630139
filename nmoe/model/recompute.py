"""Backward computes a part again instead of keeping what it needs (Chen et al., arXiv 1604.06174).

Of a part that runs through `again` only the inputs are kept. When backward comes to it, its forward
runs once more, up to the last tensor that backward needs. The same operations on the same inputs at
the same shapes give the same bits, so gradients are bit for bit those of a part that keeps everything.

That takes parts without state and without choices: nothing in a model draws random numbers, and
routers stay outside, because they count loads, and because two forwards must not choose twice.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


def again(part: Callable[..., T], *inputs: Any) -> T:
    """part(*inputs), differentiable in its inputs and weights; backward keeps the inputs and runs it again."""
    result: T = checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result
