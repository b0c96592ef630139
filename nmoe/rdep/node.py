"""The ranks of one machine: the signals between them and the memory that they share.

Expert transport, ordered sums of gradients and whatever else the ranks exchange use one list of phases
(`nmoe.rdep.signals`) and one file of memory for each rank (`nmoe.rdep.memory`), so that one phase says of all
of them that what was read before may be written again, and whoever waits learns of a failure anywhere.
"""

import os
from types import TracebackType

import torch
from torch import Tensor

from nmoe.rdep.memory import Regions, create, mapped
from nmoe.rdep.rendezvous import meet
from nmoe.rdep.signals import Signals


class Node:
    """One rank among its node's. A context: leaving it tells the peers whether this rank is done or has failed.

    store: shared by exactly these ranks. rank, ranks: r of N, of this node; first: what the launch calls its rank 0,
    whose names messages use. regions: of each rank's memory, the same on all; sizes: what they are for, in words.
    timeout_s: how long a rank waits for its peers, in seconds, when they meet and in every phase. memory: each
    rank's regions. RunError N0805 or N0806 if they cannot meet, or there is no room.
    """

    def __init__(
        self, *, store: torch.distributed.Store, rank: int, ranks: int, regions: Regions, sizes: str, timeout_s: float,
        first: int = 0,
    ) -> None:  # fmt: skip
        self.rank, self.ranks, self.first = rank, ranks, first
        names = range(first, first + ranks)
        file = create(regions)
        try:
            peers = meet(store, rank=names[rank], ranks=names, memory=file, sizes=sizes, timeout_s=timeout_s)
            self.signals = Signals(
                rank=names[rank], sockets={name: peer.end for name, peer in peers.items()}, timeout_s=timeout_s
            )
            files = {names[rank]: file, **{name: peer.memory for name, peer in peers.items()}}
            self.memory: list[dict[str, Tensor]] = [mapped(files[name], regions) for name in names]
            for peer in peers.values():
                os.close(peer.memory)
        finally:
            os.close(file)

    def __enter__(self) -> "Node":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.signals.close(error)

    @property
    def phase(self) -> int:
        """The number of the phase that this rank has come to."""
        return self.signals.here.number

    def begin(self, phase: str, layer: int = 0) -> None:
        """Come to the next phase: everything of the phases before has been read."""
        self.signals.begin(phase, layer)

    def publish(self, peer: int) -> None:
        """Everything that this phase writes into the peer's memory, or shows it in this rank's, is there."""
        self.signals.publish(self.first + peer)

    def observe(self) -> None:
        """Wait until all peers have published this phase."""
        self.signals.observe()

    def meet(self, phase: str) -> None:
        """A phase of the whole model: publish to all what this rank's memory shows, and wait for theirs."""
        self.begin(phase)
        for peer in range(self.ranks):
            self.publish(peer)
        self.observe()
