"""Sums over ranks in one order: gradients to their owners, weights back, and small values to everybody.

Rank r of N takes microbatch jN + r in pass j. A parameter that all ranks hold has, for each microbatch, a
float32 gradient of its own; the owner of a share of it (`nmoe.sharding`) adds the parts

    g = (((g_0 + g_1) + g_2) + ...) + g_{V-1}

one after the other, in the order of the microbatches, whoever made them: N ranks do the additions that one
rank does whose backward adds each microbatch to what is there. It reads them where their makers have put them,
in the memory that the ranks of the node share: once for each pass, N - 1 of N parts from others.

The shares lie in each rank's `gradients_P` one owner after the other, so that an owner's sum is over one run of
elements. The same bytes then show the weights that the owners have updated. They may be written again once a
phase has passed since they were read (`nmoe.rdep.signals`); where none has, one is put in.

On G nodes of M ranks (`nmoe.rdep.nodes`) rank l of a node reads its node's M parts of what its counterparts, the
rank l of every node, own, and sends them there; so an owner has G M parts, and adds them in the order of the
ranks. Its experts' gradients are parts too: of the M microbatches of its node, kept apart (`nmoe.experts.grouped`).
Updated weights and small values go to the counterparts first, and from each of them to its node.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from nmoe.optim.norm import gradient
from nmoe.rdep.memory import Region
from nmoe.rdep.node import Node
from nmoe.rdep.nodes import Nodes, Tensors
from nmoe.sharding import Share

if TYPE_CHECKING:
    from nmoe.experts.grouped import Apart
    from nmoe.rdep.cuda_node import CudaNode

Piece: TypeAlias = tuple[str, slice]
"""A run of elements: of a tensor of this rank's experts, by its name, or, without one, of `gradients_P`."""


def regions(shares: Sequence[Share], values: int, nodes: int = 1) -> dict[str, Region]:
    """What a `Reduction` needs. shares: all ranks', without experts'. values: of one rank in one `gather`, at most."""
    _, places = in_places(shares)
    return {
        "gradients_P": (torch.float32, (places[-1].stop if places else 0,)),
        "values_2GX": (torch.float64, (2, nodes, 1 + values)),
    }


def in_places(shares: Sequence[Share]) -> tuple[list[Share], list[slice]]:
    """The shares one owner after the other, and the elements of `gradients_P` that each has."""
    in_order, places, end = sorted(shares, key=lambda share: share.rank), [], 0
    for share in in_order:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        end = start + share.stop - share.start
        places.append(slice(start, end))
    return in_order, places


ALIGNMENT = 4
"""A share begins at a multiple of so many elements: 16 bytes, which kernels load at once."""


class Alone:
    """The only rank: backward adds up in `grad` by itself, and nobody else has anything to say."""

    rank, ranks = 0, 1

    def clear(self) -> None:
        """See `Reduction`."""

    def open(self) -> None:
        """See `Reduction`."""

    def show(self) -> None:
        """See `Reduction`."""

    def add(self) -> None:
        """See `Reduction`."""

    def deliver(self) -> None:
        """See `Reduction`."""

    def share(self) -> None:
        """See `Reduction`."""

    def gather(self, mine_X: Tensor) -> list[Tensor]:
        """See `Reduction`."""
        return [mine_X]

    def gather_rows(self, mine_X: Tensor) -> Tensor:
        """See `Reduction`."""
        return mine_X[None]


class Reduction:
    """One rank of several.

    nodes: all ranks, by way of this node's host processes, which have the region of the values. node: with the other
    regions of `regions`; the host processes again where the arithmetic is on the CPU. parameters: of this rank,
    by name, contiguous, of one dtype of at most four bytes: those that all ranks hold, and, on several nodes, its
    experts, whose gradients are in `apart`. shares: who owns what of them. owned: this rank's shares, by the
    names of their parameters, as parameters whose `grad` is the sum.
    """

    def __init__(
        self,
        *,
        nodes: Nodes,
        node: "Node | CudaNode",
        parameters: Mapping[str, torch.nn.Parameter],
        shares: Sequence[Share],
        owned: Mapping[str, torch.nn.Parameter],
        apart: Mapping[str, "Apart"],
    ) -> None:
        self.nodes, self.node, self.host, self.rank, self.ranks = nodes, node, nodes.node, nodes.rank, nodes.ranks
        self.parameters, self.owned, self.apart = dict(parameters), dict(owned), dict(apart)
        self.dtype = next(iter(self.parameters.values())).dtype
        self.shares, self.places = in_places([share for share in shares if share.name not in apart])
        self.expert_shares = [share for share in shares if share.name in apart]
        self.first = {share.name: share.start for share in reversed(self.expert_shares)}
        self.mine = self._pieces(self.rank)
        device, per_node = node.memory[node.rank]["gradients_P"].device, node.ranks
        self.sums = [torch.empty(piece.stop - piece.start, device=device) for _, piece in self.mine]
        self.parts: list[list[Tensor]] = []
        """What this rank adds, in the order of the ranks that have made it."""
        self.sends, self.receives = {}, {}
        self.weight_sends, self.weight_receives = {}, {}
        for number in range(nodes.count):
            theirs = self._pieces(number * per_node + self.node.rank)
            here = [self._parts(member, theirs) for member in range(per_node)]
            if number != nodes.number:
                self.sends[number] = list(itertools.chain.from_iterable(here))
                here = [[torch.empty_like(total) for total in self.sums] for _ in range(per_node)]
                self.receives[number] = list(itertools.chain.from_iterable(here))
                self.weight_sends[number] = [self._weight(piece) for piece in self.mine]
                self.weight_receives[number] = [self._weight(piece) for piece in theirs]
            self.parts += here
        self.opened = self.read_in = 0
        self.parity = 0
        self.clear()

    def clear(self) -> None:
        """Begin a new sum."""
        self._begin(True)

    def open(self) -> None:
        """A microbatch begins."""
        self.opened = self.node.phase

    def show(self) -> None:
        """A microbatch ends: this rank's `grad` of the parameters is shown to the others, and is None afterwards.

        What was shown before has been read once a phase has passed: one of the experts' in this microbatch, or one
        that is put in. Which it is does not depend on what was before the microbatch, so that a recording of it holds.
        """
        if self.node.phase == self.opened:
            self.node.meet("values")
        mine_P = self.node.memory[self.node.rank]["gradients_P"]
        alike = {name: parameter for name, parameter in self.parameters.items() if name not in self.apart}
        gradients = {name: gradient(name, parameter).view(-1) for name, parameter in alike.items()}
        copy(
            [
                (mine_P[place], gradients[share.name][share.start : share.stop])
                for share, place in zip(self.shares, self.places, strict=True)
            ]
        )
        for parameter in alike.values():
            parameter.grad = None

    def add(self) -> None:
        """A pass is over: every rank has shown its microbatch's gradients, and each adds what it owns."""
        self.node.meet("gradients")
        self._between_nodes("gradients", self.sends, self.receives)
        for number, parts in enumerate(self.parts):
            for total, part in zip(self.sums, parts, strict=True):
                if self.begins and number == 0:
                    total.copy_(part)
                else:
                    total.add_(part)
        self._begin(False)
        self.read_in = self.node.phase

    def deliver(self) -> None:
        """The sums of all passes become the `grad` of this rank's shares."""
        for (expert, piece), total in zip(self.mine, self.sums, strict=True):
            if expert:
                self.owned[expert].grad = total.view(self.owned[expert].shape)
                continue
            for share, place in zip(self.shares, self.places, strict=True):
                if share.rank == self.rank:
                    owned = self.owned[share.name]
                    owned.grad = total[place.start - piece.start : place.stop - piece.start].view(owned.shape)

    @torch.no_grad()
    def share(self) -> None:
        """Every rank's copies of the parameters become what their owners have made of them."""
        if self.node.phase == self.read_in:  # what was shown there may still be being read
            self.node.meet("values")
        mine: list[tuple[Tensor, Tensor]] = []
        others: list[tuple[Tensor, Tensor]] = []
        for share, place in zip(self.shares, self.places, strict=True):
            pair = self._copy(share), self._weight(("", place), share.rank % self.node.ranks)
            (mine if share.rank == self.rank else others).append(pair)
        copy([(shown, weight) for weight, shown in mine])
        self._between_nodes("weights", self.weight_sends, self.weight_receives)
        self.node.meet("weights")
        copy(others)
        self.read_in = self.node.phase

    def gather(self, mine_X: Tensor) -> list[Tensor]:
        """What each rank brings, float64 vectors in the order of the ranks; the same on all of them."""
        if not isinstance(self.node, Node):
            self.node.late.check()
        self.parity ^= 1
        boards = [memory["values_2GX"][self.parity] for memory in self.host.memory]
        mine_GX = boards[self.host.rank]
        board_X = mine_GX[self.nodes.number]
        board_X[0] = mine_X.numel()
        board_X[1 : 1 + mine_X.numel()].copy_(mine_X)
        others = self.nodes.others
        self.nodes.exchange({one: [board_X] for one in others}, {one: [mine_GX[one]] for one in others})
        self.host.meet("values")
        found = [board_GX[number] for number in range(self.nodes.count) for board_GX in boards]
        return [board_X[1 : 1 + int(board_X[0])].clone() for board_X in found]

    def gather_rows(self, mine_X: Tensor) -> Tensor:
        """(N, X): every rank's float32 vector of X elements, on the device; X the same on all."""
        if isinstance(self.node, Node):
            return torch.stack(self.gather(mine_X)).float()
        mine_MX = self.node.gather(mine_X)
        all_GMX = mine_MX.new_empty(self.nodes.count, *mine_MX.shape)
        all_GMX[self.nodes.number] = mine_MX
        others = self.nodes.others
        self._between_nodes("values", {one: [mine_MX] for one in others}, {one: [all_GMX[one]] for one in others})
        return all_GMX.view(self.ranks, -1)

    def _between_nodes(self, what: str, sends: Tensors, receives: Tensors) -> None:
        """An exchange with the counterparts, of tensors that lie where the arithmetic is."""
        if isinstance(self.node, Node):
            self.nodes.exchange(sends, receives)
        else:
            self.nodes.exchange_on_gpus(what, sends, receives)

    def _begin(self, begins: bool) -> None:
        self.begins = begins
        for one in self.apart.values():
            one.begins = begins and self.nodes.number == 0

    def _pieces(self, rank: int) -> list[Piece]:
        """What a rank owns: one run of what all ranks hold, and of each expert tensor one."""
        run = [place for share, place in zip(self.shares, self.places, strict=True) if share.rank == rank]
        of_experts = [
            (share.name, slice(share.start - self.first[share.name], share.stop - self.first[share.name]))
            for share in self.expert_shares
            if share.rank == rank
        ]
        return [*([("", slice(run[0].start, run[-1].stop))] if run else []), *of_experts]

    def _parts(self, member: int, pieces: Sequence[Piece]) -> list[Tensor]:
        """What a rank of this node has of some pieces: float32 gradients of its microbatch."""
        shown_P = self.node.memory[member]["gradients_P"]
        return [
            self.apart[expert].parts_M[member].view(-1)[place] if expert else shown_P[place] for expert, place in pieces
        ]

    def _copy(self, share: Share) -> Tensor:
        """This rank's copy of a share of the weights."""
        return self.parameters[share.name].detach().view(-1)[share.start : share.stop]

    def _weight(self, piece: Piece, member: int | None = None) -> Tensor:
        """The weights of a piece: in the memory of a rank of this node (None: this one), experts' where they are."""
        expert, place = piece
        if expert:
            return self.parameters[expert].detach().view(-1)[place]
        memory = self.node.memory[self.node.rank if member is None else member]
        return memory["gradients_P"].view(self.dtype)[place]


def copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Every first of a pair becomes its second, in as few launches as there can be."""
    if pairs:
        torch._foreach_copy_([to for to, _ in pairs], [what for _, what in pairs])
