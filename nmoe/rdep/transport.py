"""What a transport is: the way of a token's row to its experts, and of their outputs back.

For the same inputs every transport returns the same bits, whatever the number of ranks behind it:
the layout is computed, not negotiated; experts see (expert, microbatch) segments; the return adds
a token's rows in the order of k.
"""

from typing import TYPE_CHECKING, Protocol, TypeAlias

from torch import Tensor

from nmoe.rdep.layout import Layout

if TYPE_CHECKING:
    from nmoe.kernels.layout import Layout as DeviceLayout

Places: TypeAlias = "Layout | DeviceLayout"
"""The layout of a routing: plain torch's on the CPU, the kernels' on a GPU."""


class Experts(Protocol):
    """The experts as a transport sees them."""

    num_experts: int

    def __call__(self, x_TD: Tensor, weights_TK: Tensor, places: Places) -> Tensor: ...


class Transport(Protocol):
    """Layout, and then dispatch, experts and return, of one MoE layer and one microbatch.

    Two calls, because a layer that computes its experts again in backward lays them out once.
    """

    def layout(self, indices_TK: Tensor, num_experts: int) -> Places:
        """The places of the pairs that a routing chose."""
        ...

    def run(self, x_TD: Tensor, weights_TK: Tensor, places: Places, experts: Experts) -> Tensor:
        """y_t = sum over k of w_tk * expert_{i_tk}(x_t), (T, D); differentiable in x, w and the experts' weights."""
        ...
