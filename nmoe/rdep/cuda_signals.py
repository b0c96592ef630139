"""Signals between the GPUs of a node: `nmoe.kernels.signals`, and what a wait in vain says to the host.

The host never waits for a phase. What comes too late is seen on the device: `Late.verdict` is then set, which every
write of the training's state must heed, and `Late.check`, which the training calls once a step and which does not
wait, raises what the CPU ranks' time-out raises. A process that died is seen by its peers as a wait in vain too;
whoever watches the processes is quicker.
"""

import torch
from torch import Tensor

from nmoe.errors import fail
from nmoe.kernels.signals import FLAG_WORDS, REPORT_WORDS, meet
from nmoe.rdep.cuda_memory import CudaMemory, Regions

NAMES: list[str] = []
"""The phases' names by the number that a report carries, in the order in which this process first came to them."""


class Late:
    """The first wait in vain of this rank, whichever exchange it was in; one for all exchanges of a device.

    verdict: int32 (1) on the device, not zero once a peer has not come; it stays so.
    """

    def __init__(self, *, rank: int, device: torch.device, timeout_s: float) -> None:
        self.rank, self.timeout_s = rank, timeout_s
        self.verdict = torch.zeros(1, dtype=torch.int32, device=device)
        self.report = torch.zeros(REPORT_WORDS, dtype=torch.int64).pin_memory()

    def check(self) -> None:
        """RunError N0803 if a peer has not come in time. Does not wait for the device."""
        if not int(self.report[0]):
            return
        torch.cuda.synchronize(self.verdict.device)  # the rest of the report
        peer, name, layer, seen, expected = self.report[1:].tolist()
        here = f"phase {expected}, `{NAMES[name]}` of layer {layer}"
        raise fail(
            "N0803",
            f"rank {peer} did not come to {here} within {self.timeout_s:g} s",
            place=f"rank {self.rank} at {here}",
            help="see whether it is stopped, or does something that takes longer",
            notes=[f"seen of rank {peer}: {f'phase {seen}' if seen else 'no phase yet'}", f"expected: {here}"],
        )


class CudaSignals:
    """One rank's end of the signals of one exchange. memory: has the regions of `regions()` for these ranks."""

    def __init__(self, *, memory: CudaMemory, late: Late) -> None:
        self.memory, self.late = memory, late
        self.phase = torch.zeros(1, dtype=torch.int64, device=memory.buffer.device)

    @staticmethod
    def regions(ranks: int) -> Regions:
        """What must be shared: a flag of each rank, in cache lines of its own."""
        return {"flags": (torch.int64, (ranks * FLAG_WORDS,))}

    def meet(self, name: str, layer: int = 0, *, words: Tensor | None = None, boxes_N: Tensor | None = None) -> None:
        """Publish the next phase and wait, on the device and in this stream's order, until every peer has.

        name, layer: for messages. words: int32, put at [rank] of every rank's box (N, words), whose table boxes_N is.
        """
        if name not in NAMES:
            NAMES.append(name)
        meet(
            phase=self.phase, flags=self.memory.mine["flags"], peers_N=self.memory.table["flags"],
            verdict=self.late.verdict, report=self.late.report, name=NAMES.index(name), layer=layer,
            limit_ns=int(self.late.timeout_s * 1e9), rank=self.memory.rank, words=words, boxes_N=boxes_N,
        )  # fmt: skip
