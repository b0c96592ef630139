"""The transport between CPU processes of one node, over memory that they share.

    counts             each rank writes its counts where all can read them; all compute the same layout
    rows               a source writes a token's row once to each owner that has one of its experts, and
                       for each pair, at its expert row: which token, which pair, which weight
    outputs            an owner writes each pair's output row into the source's slot [token, k]
    output gradients   as rows, over the saved layout, unweighted and without the index
    input gradients    as outputs, with one float32 <dA', A> for each pair

To publish a phase is also to say that everything of the phases before it has been read
(`nmoe.rdep.signals`), and that is what makes a buffer free: received rows are read before their owner
publishes outputs or input gradients, and written by nobody until then; returned ones are read before
their source publishes its next counts or output gradients. So there are no messages that say only "free".
What backward needs is copied out of the shared memory.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nmoe.rdep.layout import Layout, layout, route
from nmoe.rdep.memory import Memory, Sizes
from nmoe.rdep.node import Node
from nmoe.rdep.transport import Received

if TYPE_CHECKING:
    from nmoe.rdep.arena import Arena


class ShmTransport:
    """One rank's end of the transport. node: its memory has the regions of `sizes`, the same on all ranks."""

    arena: "Arena | None" = None

    def __init__(self, *, node: Node, sizes: Sizes) -> None:
        self.node, self.rank, self.ranks, self.sizes = node, node.rank, node.ranks, sizes
        self.memory = [Memory(**{name: regions[name] for name in sizes.regions()}) for regions in node.memory]
        self.count_parity = 0

    def layout(self, indices_TK: Tensor, num_experts: int, layer: int) -> Layout:
        """As `Transport.layout`. RunError N0807 for more tokens than the buffers were made for."""
        self.sizes.require(indices_TK, num_experts, layer)
        routing = route(indices_TK, num_experts=num_experts, ranks=self.ranks)
        self.node.begin("counts", layer)
        self.count_parity ^= 1
        torch.cat([routing.pairs_E, routing.tokens_N], out=self.memory[self.rank].counts_2C[self.count_parity])
        for peer in range(self.ranks):
            self.node.publish(peer)
        self.node.observe()
        counts_NC = torch.stack([memory.counts_2C[self.count_parity] for memory in self.memory])
        pairs_NE, tokens_NN = counts_NC.split([num_experts, self.ranks], dim=1)
        return layout(routing, pairs_NE, tokens_NN, rank=self.rank, layer=layer)

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, places: Layout) -> Received:
        """As `Transport.dispatch`."""
        self.node.begin("rows", places.layer)
        owner_P, row_P, weight_P = (t.reshape(-1) for t in (places.owner_TK, places.row_TK, weights_TK))
        token_P = places.place_TN.gather(1, places.owner_TK).view(-1).int()
        for owner, memory in enumerate(self.memory):
            pair_Q = (owner_P == owner).nonzero().view(-1)
            row_Q = row_P[pair_Q]
            memory.token_R.index_copy_(0, row_Q, token_P[pair_Q])
            memory.pair_R.index_copy_(0, row_Q, pair_Q.int())
            memory.weight_R.index_copy_(0, row_Q, weight_P[pair_Q])
            self._write_rows(x_TD, owner, places)
            self.node.publish(owner)
        self.node.observe()
        mine, rows = self.memory[self.rank], int(places.segments_LN.sum())
        return Received(
            self._received(places).clone(), mine.token_R[:rows].long(), mine.weight_R[:rows].clone(),
            mine.pair_R[:rows].long(),
        )  # fmt: skip

    def give_back(self, y_RD: Tensor, received: Received, places: Layout) -> tuple[Tensor, Tensor]:
        """As `Transport.give_back`."""
        self.node.begin("outputs", places.layer)
        for source, parts in enumerate(self._parts(places)):
            for part in parts:
                self.memory[source].returned_PD.index_copy_(0, received.pair_R[part], y_RD[part])
            self.node.publish(source)
        self.node.observe()
        return self._slots(places)

    def dispatch_gradients(self, dy_TD: Tensor, places: Layout) -> Tensor:
        """As `Transport.dispatch_gradients`; free after the next call."""
        self.node.begin("output gradients", places.layer)
        for owner in range(self.ranks):
            self._write_rows(dy_TD, owner, places)
            self.node.publish(owner)
        self.node.observe()
        return self._received(places)

    def give_back_gradients(
        self, dx_RD: Tensor, d_weight_R: Tensor, received: Received, places: Layout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Transport.give_back_gradients`."""
        self.node.begin("input gradients", places.layer)
        for source, parts in enumerate(self._parts(places)):
            memory = self.memory[source]
            for part in parts:
                memory.returned_PD.index_copy_(0, received.pair_R[part], dx_RD[part])
                memory.d_weight_P.index_copy_(0, received.pair_R[part], d_weight_R[part])
            self.node.publish(source)
        self.node.observe()
        rows_PD, row_TK = self._slots(places)
        return rows_PD, row_TK, self.memory[self.rank].d_weight_P[: row_TK.numel()].clone().view(row_TK.shape)

    def _write_rows(self, rows_TD: Tensor, owner: int, places: Layout) -> None:
        """The rows of the tokens that have an expert there, into this rank's part of the owner's rows."""
        token_U = places.sent_TN[:, owner].nonzero().view(-1)
        start = int(places.tokens_NN[: self.rank, owner].sum())
        part_UD = self.memory[owner].rows_UD[start : start + token_U.numel()]
        torch.index_select(rows_TD, 0, token_U, out=part_UD)

    def _received(self, places: Layout) -> Tensor:
        """All sources' rows, one source after the other."""
        return self.memory[self.rank].rows_UD[: int(places.tokens_NN[:, self.rank].sum())]

    def _parts(self, places: Layout) -> list[list[slice]]:
        """The segments of each source, as slices of this rank's rows."""
        parts: list[list[slice]] = [[] for _ in range(self.ranks)]
        start = 0
        for segments in places.segments_LN.tolist():
            for source, rows in enumerate(segments):
                parts[source].append(slice(start, start + rows))
                start += rows
        return parts

    def _slots(self, places: Layout) -> tuple[Tensor, Tensor]:
        """The rows that came back for this rank's pairs, and row_TK: the slot of [token, k] is the pair's number."""
        row_TK = torch.arange(places.row_TK.numel()).view(places.row_TK.shape)
        return self.memory[self.rank].returned_PD[: row_TK.numel()], row_TK
