"""What a transport is: the way of a token's row to its experts, and of their outputs back.

For the same inputs every transport returns the same bits, whatever the number of ranks behind it:
the layout is computed, not negotiated; experts see (expert, microbatch) segments; the return adds
a token's rows in the order of k.

One layer and one microbatch call, in this order, `layout`, `dispatch`, `give_back`, and for
backward `dispatch_gradients`, `give_back_gradients`. On several ranks these are the phases that all
ranks run together, empty microbatches included. What a call returns may lie in memory that the next
call gives free, except what `dispatch` returns: that is kept for backward. One rank on a GPU has kernels that
gather and add by themselves: of the five only `layout` is called. Several GPUs have layouts and rows in the kernels'
own types (`nmoe.kernels.layout_ranks`, `nmoe.kernels.exchange`), with room for the most there can be.
"""

from typing import TYPE_CHECKING, Protocol, TypeAlias

import attrs
from torch import Tensor

from nmoe.rdep.layout import Layout

if TYPE_CHECKING:
    from nmoe.kernels.layout import Layout as DeviceLayout
    from nmoe.kernels.layout_ranks import Places as DevicePlaces
    from nmoe.rdep.arena import Arena
    from nmoe.rdep.cuda import CudaTransport

Places: TypeAlias = "Layout | DeviceLayout | DevicePlaces"
"""The layout of a routing: plain torch's on the CPU, the kernels' on one GPU and on several."""

AnyTransport: TypeAlias = "Transport | CudaTransport"
"""The second has the first's verbs, with the kernels' types."""


@attrs.frozen(eq=False)
class Received:
    """What an owner has of everybody's tokens, for its R rows.

    x_UD: (U, D), the tokens' rows by (microbatch, token). token_R: (R,) int64, which of them a row reads.
    weight_R: (R,) float32, the router's weight. pair_R: (R,) int64, the pair t*K + k in its microbatch.
    """

    x_UD: Tensor
    token_R: Tensor
    weight_R: Tensor
    pair_R: Tensor


class Transport(Protocol):
    """Dispatch and return between the ranks that share the experts.

    ranks: N, of which each holds E / N experts. rank: which of them this one is. arena: where the experts of all layers
    put what backward needs; None where each layer keeps its own, whose size the host knows.
    """

    rank: int
    ranks: int
    arena: "Arena | None"

    def layout(self, indices_TK: Tensor, num_experts: int, layer: int) -> Places:
        """The places of the pairs that a routing chose. num_experts: E, of all ranks. layer: for messages."""
        ...

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, places: Layout) -> Received:
        """x_TD: (T, D). weights_TK: (T, K) float32. Every rank's tokens for this rank's experts."""
        ...

    def give_back(self, y_RD: Tensor, received: Received, places: Layout) -> tuple[Tensor, Tensor]:
        """y_RD: (R, D), this rank's experts' outputs. Rows (., D), and row_TK: where each of this rank's pairs lies."""
        ...

    def dispatch_gradients(self, dy_TD: Tensor, places: Layout) -> Tensor:
        """dy_TD: (T, D), unweighted. dy_UD: (U, D), in the order of `Received.x_UD`."""
        ...

    def give_back_gradients(
        self, dx_RD: Tensor, d_weight_R: Tensor, received: Received, places: Layout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dx_RD: (R, D), d_weight_R: (R,) float32. Rows and row_TK as `give_back`, and d_weights_TK float32."""
        ...
