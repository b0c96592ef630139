"""The transport between the GPUs of one node, over memory that they share.

The phases are those of `nmoe.rdep.shm`, and so is what makes a buffer free: to publish a phase is to say that
everything of the phases before it has been read, because the kernels that read are earlier in the stream.

    counts             each rank puts its counts into every rank's box; all compute the same layout
    rows               a source stores a token's row once at each owner that has one of its experts, with the list of
                       its pairs there: expert row, weight
    outputs            an owner stores each pair's output row into the source's slot [token, k]
    output gradients   as rows, over the saved layout, unweighted and without the lists
    input gradients    as outputs, with one float32 <dA', A> for each pair

A phase is a kernel that stores, and the node's `meet`. Nothing here waits for the device or depends on how
many rows came: buffers and grids are for the most there can be, N * T tokens, and counts stay on the device. What
backward needs is copied out of the shared memory; pre-activations are in the arena, whose rows a layout reserves.

Input gradients are on their way while the caller's stream computes: their phase is the side stream's. It is still one
list of phases, because the side stream begins after what the other has been given, and the other has no phase until it
has waited for it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nmoe.kernels.exchange import Lists, Received, dispatch, give_back, keep
from nmoe.kernels.launch import RETURN_BESIDE_LAUNCH
from nmoe.kernels.layout_ranks import Places, count, place
from nmoe.rdep.arena import Arena
from nmoe.rdep.cuda_node import CudaNode
from nmoe.rdep.memory import Regions, Sizes
from nmoe.rdep.side import beside as on_the_side


def regions(sizes: Sizes) -> Regions:
    """What a rank shares. counts: two boxes used by turns, so that one layout may follow another at once."""
    received, pairs = sizes.ranks * sizes.tokens, sizes.tokens * sizes.top_k
    return {
        "counts_2NC": (torch.int32, (2, sizes.ranks, sizes.num_experts + sizes.ranks)),
        "rows_UD": (sizes.dtype, (received, sizes.hidden_size)),
        "row_UK": (torch.int32, (received, sizes.top_k)),
        "weight_UK": (torch.float32, (received, sizes.top_k)),
        "token_U": (torch.int32, (received,)),
        "returned_PD": (sizes.dtype, (pairs, sizes.hidden_size)),
        "d_weight_P": (torch.float32, (pairs,)),
    }


class CudaTransport:
    """One rank's end of the transport. node: its memory has the regions of `regions(sizes)`, the same on all ranks."""

    def __init__(self, *, node: CudaNode, sizes: Sizes, arena: Arena) -> None:
        self.node, self.rank, self.ranks, self.sizes, self.arena = node, node.rank, node.ranks, sizes, arena
        self.mine, self.table = node.memory[node.rank], node.table
        words = sizes.ranks * (sizes.num_experts + sizes.ranks)
        first = self.table["counts_2NC"]
        self.count_boxes_N = (first, first + words * torch.int32.itemsize)
        self.count_parity = 0
        self.lists = Lists(self.table["row_UK"], self.table["weight_UK"], self.table["token_U"])
        pairs = torch.arange(sizes.tokens * sizes.top_k, dtype=torch.int32, device=node.device)
        self.slot_TK = pairs.view(sizes.tokens, sizes.top_k)

    def meet(self, phase: str, layer: int, words: Tensor | None = None, boxes_N: Tensor | None = None) -> None:
        """Everything that this phase stores at a peer is there, and everything of the phases before has been read."""
        self.node.meet(phase, layer, words=words, boxes_N=boxes_N)

    def layout(self, indices_TK: Tensor, num_experts: int, layer: int) -> Places:
        """As `Transport.layout`. RunError N0807 for more tokens than the buffers were made for."""
        self.sizes.require(indices_TK, num_experts, layer)
        counted = count(indices_TK, num_experts=num_experts, ranks=self.ranks)
        self.count_parity ^= 1
        self.meet("counts", layer, counted.counts_C, self.count_boxes_N[self.count_parity])
        counts_NC = self.mine["counts_2NC"][self.count_parity]
        most_tokens = self.sizes.tokens
        places = place(indices_TK, counted, counts_NC, rank=self.rank, most_tokens=most_tokens, layer=layer)
        return places._replace(first_row=self.arena.reserve(counts_NC, layer))

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, places: Places) -> Received:
        """As `Transport.dispatch`; x_UD and the lists have room for N * T tokens."""
        mine = self.mine
        x_UD = torch.empty_like(mine["rows_UD"])
        dispatch(x_TD, places, self.table["rows_UD"], x_UD, self.rank, weights_TK, self.lists)
        self.meet("rows", places.layer)
        return keep(mine["rows_UD"], mine["row_UK"], mine["weight_UK"], mine["token_U"], x_UD, places, self.rank)

    def give_back(self, y_RD: Tensor, received: Received, places: Places) -> tuple[Tensor, Tensor]:
        """As `Transport.give_back`; row_TK is int32."""
        give_back(y_RD, received, self.table["returned_PD"])
        self.meet("outputs", places.layer)
        return self._slots(places)

    def dispatch_gradients(self, dy_TD: Tensor, places: Places) -> Tensor:
        """As `Transport.dispatch_gradients`; free after the next call."""
        dy_UD = self.mine["rows_UD"]
        dispatch(dy_TD, places, self.table["rows_UD"], dy_UD, self.rank)
        self.meet("output gradients", places.layer)
        return dy_UD

    def give_back_gradients(
        self, dx_RD: Tensor, d_weight_R: Tensor, received: Received, places: Places, beside: Callable[[], None]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Transport.give_back_gradients`; d_weight_R in parts, float32 (parts, R), which are added in order.

        beside: launches what runs meanwhile, and spares RETURN_BESIDE_LAUNCH.blocks multiprocessors. It reads nothing
        that lies in shared memory, and has no phase.
        """
        with on_the_side(self.node.device) as join:  # first, so that its blocks find multiprocessors that are free
            give_back(
                dx_RD, received, self.table["returned_PD"], d_weight_R, self.table["d_weight_P"], RETURN_BESIDE_LAUNCH
            )
            self.meet("input gradients", places.layer)
        beside()
        join()
        rows_PD, slot_TK = self._slots(places)
        d_weights_P = self.mine["d_weight_P"][: slot_TK.numel()]
        return rows_PD, slot_TK, d_weights_P.clone().view(slot_TK.shape)

    def _slots(self, places: Places) -> tuple[Tensor, Tensor]:
        """The rows that came back for this rank's pairs, and where: the slot of [token, k] is the pair's number."""
        return self.mine["returned_PD"], self.slot_TK[: len(places.row_TK)]
