"""The GPUs of one machine: the signals between them and the memory that they share. As `nmoe.rdep.node` for processes.

Expert transport, ordered sums of gradients and whatever else the ranks exchange use one list of phases and one
allocation on each GPU. A phase is a kernel (`nmoe.kernels.signals`), in the order of the stream: whatever the stream
has been given before is done and read, everywhere, before what it is given next begins. The host never waits. What
comes too late is seen on the device: `Late.verdict` is then set, which every write of the training's state must heed,
and `Late.check`, which the training calls once a step and which does not wait, raises what the CPU ranks' time-out
raises. A process that died is seen by its peers as a wait in vain too; whoever watches the processes is quicker.
"""

from types import TracebackType

import torch
from torch import Tensor

from nmoe.errors import fail
from nmoe.kernels.signals import FLAG_WORDS, REPORT_WORDS, meet
from nmoe.rdep.cuda_memory import CudaMemory
from nmoe.rdep.memory import Regions


class Late:
    """The first wait in vain of this rank.

    verdict: int32 (1) on the device, not zero once a peer has not come; it stays so. timeout_s: how long a rank waits
    in every phase, in seconds. names: the phases' names by the number that a report carries.
    """

    def __init__(self, *, rank: int, device: torch.device, timeout_s: float) -> None:
        self.rank, self.timeout_s = rank, timeout_s
        self.verdict = torch.zeros(1, dtype=torch.int32, device=device)
        self.report = torch.zeros(REPORT_WORDS, dtype=torch.int64).pin_memory()
        self.names: list[str] = []

    def number(self, name: str) -> int:
        """The number of a phase's name."""
        if name not in self.names:
            self.names.append(name)
        return self.names.index(name)

    def check(self) -> None:
        """RunError N0803 if a peer has not come in time. Does not wait for the device."""
        if not int(self.report[0]):
            return
        torch.cuda.synchronize(self.verdict.device)  # the rest of the report
        peer, name, layer, seen, expected = self.report[1:].tolist()
        here = f"phase {expected}, `{self.names[name]}` of layer {layer}"
        raise fail(
            "N0803",
            f"rank {peer} did not come to {here} within {self.timeout_s:g} s",
            place=f"rank {self.rank} at {here}",
            help="see whether it is stopped, or does something that takes longer",
            notes=[f"seen of rank {peer}: {f'phase {seen}' if seen else 'no phase yet'}", f"expected: {here}"],
        )


class CudaNode:
    """One rank among its node's. Made by all of them together. A context: leaving it waits until all are done.

    group: exactly these ranks; None for one alone, as a node of a launch may have. regions: of each rank's
    memory, the same on all. values: bytes that one rank brings to a `gather`, at most. timeout_s: how long a rank
    waits in every phase, in seconds. RunError N0806 if there is no room.

    memory: each rank's regions. table: by name, the ranks' addresses, int64 (N), for kernels. phase: the number of
    the phase that this rank's stream has been given last.
    """

    def __init__(
        self, *, group: torch.distributed.ProcessGroup | None, regions: Regions, values: int, device: torch.device,
        timeout_s: float,
    ) -> None:  # fmt: skip
        self.rank, self.ranks = (0, 1) if group is None else (group.rank(), group.size())
        self.device = device
        self.words, self.parity, self.phase = -(-values // 4), 0, 0
        own: Regions = {
            "flags": (torch.int64, (self.ranks * FLAG_WORDS,)),
            "boxes_2NX": (torch.int32, (2, self.ranks * self.words)),
        }
        shared = CudaMemory({**own, **regions}, group=group, device=device)
        self.shared, self.memory, self.table = shared, shared.ranks, shared.table
        self.late = Late(rank=self.rank, device=device, timeout_s=timeout_s)
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        first = self.table["boxes_2NX"]
        self.boxes_N = (first, first + self.ranks * self.words * torch.int32.itemsize)

    def __enter__(self) -> "CudaNode":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:  # this rank's memory must not go while a peer still stores there
            self.meet("end")
            torch.cuda.synchronize(self.device)
            self.late.check()

    def meet(self, phase: str, layer: int = 0, *, words: Tensor | None = None, boxes_N: Tensor | None = None) -> None:
        """Publish the next phase to all, and wait for theirs, on the device.

        phase, layer: for messages. words: int32, put at [rank] of every rank's box (N, words), whose table boxes_N is.
        """
        self.phase += 1
        meet(
            phase=self.counter, flags=self.memory[self.rank]["flags"], peers_N=self.table["flags"],
            verdict=self.late.verdict, report=self.late.report, name=self.late.number(phase), layer=layer,
            limit_ns=int(self.late.timeout_s * 1e9), rank=self.rank, words=words, boxes_N=boxes_N,
        )  # fmt: skip

    def gather(self, mine_X: Tensor) -> Tensor:
        """(N, X): every rank's mine_X, rank 0's first. Elements of 4 or 8 bytes; the same X and dtype on all ranks."""
        size = mine_X.numel() * mine_X.element_size()
        if size > self.words * 4 or size % 4:
            raise fail("N0807", f"{size} bytes to gather, where room was made for {self.words * 4}", place="node")
        self.parity ^= 1
        words = mine_X.contiguous().view(torch.int32)
        self.meet("values", words=words, boxes_N=self.boxes_N[self.parity])
        box = self.memory[self.rank]["boxes_2NX"][self.parity][: self.ranks * words.numel()]
        return box.clone().view(mine_X.dtype).view(self.ranks, -1)
