"""How long the device took for the parts of a step, without waiting for it.

On a GPU an event is recorded where each part ends. They are read after the next step's wait for its verdict, when
all of them have been passed; so a step's figures are known one step later. What lies between two events is what the
device was busy with or idle in until the second.

    passes       forward and backward of all microbatches
    reduce       the sum over ranks
    norm         gradient norms and the verdict
    optimizer    the update, and the weights' way to the other ranks
"""

import torch

PARTS = ("passes", "reduce", "norm", "optimizer")


class Marks:
    """Of one step, begun when it is made; nothing on a CPU, whose host's times say it all."""

    def __init__(self, device: torch.device) -> None:
        self.events: list[torch.cuda.Event] = []
        self.on_a_device = device.type != "cpu"
        self._record()

    def end(self, part: str) -> None:
        """The part ends here; they end in their order."""
        assert not self.on_a_device or PARTS[len(self.events) - 1] == part
        self._record()

    def _record(self) -> None:
        if self.on_a_device:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.events.append(event)

    def seconds(self) -> dict[str, float]:
        """By part, for a step before the one whose verdict is known; empty on a CPU."""
        pairs = zip(self.events, self.events[1:], strict=False)
        return {part: begin.elapsed_time(end) / 1e3 for part, (begin, end) in zip(PARTS, pairs, strict=False)}
