"""What one rank holds of a logical tensor.

A logical tensor is one of the whole training: a weight's master, a moment, a router's bias. On one rank
its part is all of it. On several it may be cut into runs of elements, in row-major order, each of
them held by one rank; where it may be cut depends on the tensor alone (`nmoe.slices`).
"""

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from torch import Tensor


@attrs.frozen(eq=False)
class Part:
    """Elements [start, start + tensor.numel()) of a logical tensor of `shape`. tensor: contiguous, of any shape."""

    tensor: "Tensor"
    start: int
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, tensor: "Tensor") -> "Part":
        """All of a tensor."""
        return cls(tensor, 0, tuple(tensor.shape))
