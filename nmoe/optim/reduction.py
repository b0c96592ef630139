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
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nmoe.optim.norm import gradient
from nmoe.rdep.memory import Region
from nmoe.rdep.node import Node
from nmoe.sharding import Share

if TYPE_CHECKING:
    from nmoe.rdep.cuda_node import CudaNode


def regions(shares: Sequence[Share], values: int) -> dict[str, Region]:
    """What a `Reduction` needs. shares: all ranks', without experts'. values: of one rank in one `gather`, at most."""
    _, places = in_places(shares)
    return {
        "gradients_P": (torch.float32, (places[-1].stop if places else 0,)),
        "values_2X": (torch.float64, (2, 1 + values)),
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

    parameters: those that all ranks hold, by name, contiguous, of one dtype of at most four bytes. shares: who
    owns what of them. owned: this rank's shares, by the names of their parameters, as parameters whose `grad` is
    the sum. node: with the regions of `regions`. host: the same ranks' host processes, which is the node itself where
    the arithmetic is on the CPU; it has the region of the values.
    """

    def __init__(
        self,
        *,
        node: "Node | CudaNode",
        host: Node,
        parameters: Mapping[str, torch.nn.Parameter],
        shares: Sequence[Share],
        owned: Mapping[str, torch.nn.Parameter],
    ) -> None:
        self.node, self.host, self.rank, self.ranks = node, host, node.rank, node.ranks
        self.parameters, self.owned = dict(parameters), dict(owned)
        self.shares, self.places = in_places(shares)
        mine = [place for share, place in zip(self.shares, self.places, strict=True) if share.rank == node.rank]
        self.mine = slice(mine[0].start, mine[-1].stop) if mine else slice(0, 0)
        buffer_P = node.memory[node.rank]["gradients_P"]
        self.sum_Q = torch.empty(self.mine.stop - self.mine.start, device=buffer_P.device)
        self.is_empty = True
        self.read_in = 0
        self.parity = 0

    def clear(self) -> None:
        """Begin a new sum."""
        self.is_empty = True

    def add(self) -> None:
        """A pass is over: every rank's `grad` of the parameters is its microbatch's, and is None afterwards."""
        self._wait_until_read()
        mine_P = self.node.memory[self.rank]["gradients_P"]
        gradients = {name: gradient(name, parameter).view(-1) for name, parameter in self.parameters.items()}
        copy(
            [
                (mine_P[place], gradients[share.name][share.start : share.stop])
                for share, place in zip(self.shares, self.places, strict=True)
            ]
        )
        for parameter in self.parameters.values():
            parameter.grad = None
        self.node.meet("gradients")
        for memory in self.node.memory:
            part_Q = memory["gradients_P"][self.mine]
            if self.is_empty:
                self.sum_Q.copy_(part_Q)
            else:
                self.sum_Q.add_(part_Q)
            self.is_empty = False
        self.read_in = self.node.phase

    def deliver(self) -> None:
        """The sums of all passes become the `grad` of this rank's shares."""
        for share, place in zip(self.shares, self.places, strict=True):
            if share.rank == self.rank:
                owned = self.owned[share.name]
                owned.grad = self.sum_Q[place.start - self.mine.start : place.stop - self.mine.start].view(owned.shape)

    @torch.no_grad()
    def share(self) -> None:
        """Every rank's copies of the parameters become what their owners have made of them."""
        self._wait_until_read()
        mine: list[tuple[Tensor, Tensor]] = []
        others: list[tuple[Tensor, Tensor]] = []
        for share, place in zip(self.shares, self.places, strict=True):
            pair = self._copy(share), self._weights(share)[place]
            (mine if share.rank == self.rank else others).append(pair)
        copy([(shown, weight) for weight, shown in mine])
        self.node.meet("weights")
        copy(others)
        self.read_in = self.node.phase

    def gather(self, mine_X: Tensor) -> list[Tensor]:
        """What each rank brings, float64 vectors in the order of the ranks; the same on all of them."""
        if not isinstance(self.node, Node):
            self.node.late.check()
        self.parity ^= 1
        board_X = self.host.memory[self.rank]["values_2X"][self.parity]
        board_X[0] = mine_X.numel()
        board_X[1 : 1 + mine_X.numel()].copy_(mine_X)
        self.host.meet("values")
        boards = [memory["values_2X"][self.parity] for memory in self.host.memory]
        return [board_X[1 : 1 + int(board_X[0])].clone() for board_X in boards]

    def gather_rows(self, mine_X: Tensor) -> Tensor:
        """(N, X): every rank's float32 vector of X elements, on the device; X the same on all."""
        if isinstance(self.node, Node):
            return torch.stack(self.gather(mine_X)).float()
        return self.node.gather(mine_X)

    def _wait_until_read(self) -> None:
        """All have come to a phase behind the one that showed this rank's gradients or weights: they have been read."""
        if self.node.phase == self.read_in:
            self.node.meet("values")

    def _copy(self, share: Share) -> Tensor:
        """This rank's copy of a share of the weights."""
        return self.parameters[share.name].detach().view(-1)[share.start : share.stop]

    def _weights(self, share: Share) -> Tensor:
        """The memory of a share's owner, as weights."""
        return self.node.memory[share.rank]["gradients_P"].view(self.parameters[share.name].dtype)


def copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Every first of a pair becomes its second, in as few launches as there can be."""
    if pairs:
        torch._foreach_copy_([to for to, _ in pairs], [what for _, what in pairs])
