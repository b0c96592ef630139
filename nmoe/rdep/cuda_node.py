"""What data parallelism needs between the GPUs of one node: gradients that peers can read, a barrier, and a gathering.

The owner of a gradient's shard reads the ranks' parts where they lie and adds them in the order of the ranks, so no
library chooses the order of a sum. Everything is in the stream's order, and the host waits for nothing.
"""

import torch
from torch import Tensor

from nmoe.errors import fail
from nmoe.rdep.cuda_memory import CudaMemory
from nmoe.rdep.cuda_signals import CudaSignals, Late


class CudaNode:
    """One rank of a node's ranks, each with a flat float32 buffer of `size` elements that all can read and write.

    group: exactly these ranks, on one node. most: bytes of what one rank gives to a gathering, at most. late: what a
    wait in vain sets. Made by all ranks together. RunError N0806 if there is no room.
    """

    def __init__(
        self, *, group: torch.distributed.ProcessGroup, size: int, most: int, device: torch.device, late: Late
    ) -> None:
        ranks, self.words = group.size(), -(-most // 4)
        self.memory = CudaMemory(
            {
                **CudaSignals.regions(ranks),
                "buffer_P": (torch.float32, (size,)),
                "boxes_2NX": (torch.int32, (2, ranks * self.words)),
            },
            group=group, device=device,
        )  # fmt: skip
        self.rank, self.ranks, self.late = self.memory.rank, ranks, late
        self.signals = CudaSignals(memory=self.memory, late=late)
        first = self.memory.table["boxes_2NX"]
        self.boxes_N = (first, first + ranks * self.words * torch.int32.itemsize)
        self.parity = 0
        self.buffers = [self.memory.at(rank, "buffer_P") for rank in range(ranks)]

    def peer(self, rank: int) -> Tensor:
        """(size,) float32, that rank's buffer: this rank's own is written, a peer's is read between two `meet`s."""
        return self.buffers[rank]

    def meet(self, phase: str) -> None:
        """Whatever this stream has been given so far is done on every rank before what it is given next begins.

        phase: its name, for messages.
        """
        self.signals.meet(phase)

    def gather(self, mine_X: Tensor) -> Tensor:
        """(N, X): every rank's mine_X, rank 0's first. Elements of 4 or 8 bytes; the same X and dtype on all ranks."""
        size = mine_X.numel() * mine_X.element_size()
        if size > self.words * 4 or size % 4:
            raise fail("N0807", f"{size} bytes to gather, where room was made for {self.words * 4}", place="node")
        self.parity ^= 1
        words = mine_X.contiguous().view(torch.int32)
        self.signals.meet("gather", words=words, boxes_N=self.boxes_N[self.parity])
        box = self.memory.mine["boxes_2NX"][self.parity][: self.ranks * words.numel()]
        return box.clone().view(mine_X.dtype).view(self.ranks, -1)
