"""Who keeps what: the optimizer's state of every parameter, dealt out to the ranks of a training.

Every parameter has for each of its elements one rank that keeps the state, adds the gradients and updates it:

    experts   of M ranks of a node, rank l holds experts [l E/M, (l+1) E/M) as weights, on every node alike; of
              G nodes, expert number i of these L = E/M is kept by that rank on node i G // L
    rows      AdamW. All such parameters in their order, cut where checkpoints cut tensors (nmoe.slices), which
              is at whole rows, are one sequence of elements; a piece that begins at element b of n belongs to
              rank b * N // n
    tensors   Muon, whose matrices go through one iteration as a whole: the costliest first, of equal cost by
              name, each to the rank that has the least cost so far, of equal ones to the lowest

So where a tensor is cut does not depend on the ranks, a rank's pieces of one tensor are neighbours, and no
row ever lies on two ranks: norms add the same numbers whoever has them.
"""

import itertools
import math
from collections.abc import Iterable, Sequence

import attrs

from nmoe.slices import boundaries


@attrs.frozen(kw_only=True)
class Tensor:
    """A parameter as this module sees it. rule: "rows", "tensors" or "experts". state_dtype: as checkpoints say it."""

    name: str
    shape: tuple[int, ...]
    rule: str
    state_dtype: str


@attrs.frozen(kw_only=True)
class Share:
    """Elements [start, stop) of parameter `name` of logical `shape`, in row-major order, which `rank` keeps."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    rank: int

    @property
    def is_whole(self) -> bool:
        return self.stop - self.start == math.prod(self.shape)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of the elements: the tensor's own where all are here, whole experts or matrices, else (rows, last axis)."""
        if self.is_whole:
            return self.shape
        count = self.stop - self.start
        inner = math.prod(self.shape[1:])
        return (count // inner, *self.shape[1:]) if not count % inner else (count // self.shape[-1], self.shape[-1])

    @property
    def rows(self) -> int:
        """Slices along the last axis; a vector is one."""
        return (self.stop - self.start) // self.shape[-1]


def deal(tensors: Sequence[Tensor], *, ranks: int, ranks_per_node: int) -> list[Share]:
    """Every element of every tensor once. In the tensors' order, and of one tensor rising.

    ranks: N. ranks_per_node: M, which divides N and the number of experts.
    """
    owner_of = _whole_tensors([tensor for tensor in tensors if tensor.rule == "tensors"], ranks)
    total = sum(math.prod(tensor.shape) for tensor in tensors if tensor.rule == "rows")
    shares: list[Share] = []
    passed = 0
    for tensor in tensors:
        count = math.prod(tensor.shape)
        if tensor.rule == "tensors":
            cuts = [(0, count, owner_of[tensor.name])]
        elif tensor.rule == "experts":
            cuts = _experts(tensor, ranks, ranks_per_node)
        else:
            # A vector is one row, which nobody cuts.
            whole = [(0, count)] if len(tensor.shape) == 1 else None
            pieces = whole or boundaries(tensor.name, tensor.shape, tensor.state_dtype)
            cuts = _joined((start, stop, (passed + start) * ranks // total) for start, stop in pieces)
            passed += count
        shares.extend(
            Share(name=tensor.name, shape=tensor.shape, start=start, stop=stop, rank=rank)
            for start, stop, rank in cuts
        )
    return shares


def _experts(tensor: Tensor, ranks: int, ranks_per_node: int) -> list[tuple[int, int, int]]:
    """The pieces of an expert tensor: of each local rank's L experts, node g has those from ceil(g L / G) on."""
    nodes, each = ranks // ranks_per_node, math.prod(tensor.shape[1:])
    local = tensor.shape[0] // ranks_per_node
    firsts = [-(-node * local // nodes) for node in range(nodes + 1)]
    return [
        ((rank * local + first) * each, (rank * local + last) * each, node * ranks_per_node + rank)
        for rank in range(ranks_per_node)
        for node, (first, last) in enumerate(itertools.pairwise(firsts))
        if first < last
    ]


def _joined(cuts: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Neighbouring pieces of one rank as one."""
    joined: list[tuple[int, int, int]] = []
    for start, stop, rank in cuts:
        if joined and joined[-1][2] == rank:
            joined[-1] = (joined[-1][0], stop, rank)
        else:
            joined.append((start, stop, rank))
    return joined


def _whole_tensors(tensors: Sequence[Tensor], ranks: int) -> dict[str, int]:
    """The rank of each tensor, by what its Newton-Schulz iteration costs."""

    def cost(tensor: Tensor) -> int:
        short, long = sorted(tensor.shape[-2:])
        return math.prod(tensor.shape[:-2]) * short * short * (2 * long + short)

    load = [0] * ranks
    owner_of: dict[str, int] = {}
    for tensor in sorted(tensors, key=lambda tensor: (-cost(tensor), tensor.name)):
        rank = min(range(ranks), key=lambda rank: (load[rank], rank))
        owner_of[tensor.name] = rank
        load[rank] += cost(tensor)
    return owner_of
