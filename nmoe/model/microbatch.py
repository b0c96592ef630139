"""One microbatch, forward and backward: the same work for each, and how a GPU repeats it without its Python.

    loss = sum over tokens t of -log p(target_t)        grad += d loss / d w / T_step

Written out it is some thousand launches, which take a host longer than many a GPU takes for the work. So a training
on a GPU goes through Python in its first step, in which kernels are compiled and tables made; from the second on it
replays recordings (`nmoe.model.cuda_graph`), one of a microbatch that begins the step's gradients and one of those that
continue them. A recording repeats what the device did, at the addresses of then: the bits are the same. What
Python left behind beside it is written down here, once, and is done again after each replay:

    grad        of the parameters: recorded tensors of their own, which the recordings write
    the loss    copied out, since the next replay writes it again
    terms       of each router's balance losses, likewise

Everything else stays where it is: inputs are copied into tensors of their own; weights, biases and the routers' loads
are written in place; phases between GPUs are counted by the device; gradients are shown to the other ranks within.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import attrs
import torch
from torch import Tensor

from nmoe.model.balance import Balance
from nmoe.model.loss import chunk_of, linear_cross_entropy
from nmoe.model.transformer import Transformer, routers_of

if TYPE_CHECKING:
    from nmoe.optim.reduction import Alone, Reduction

Work = Callable[[], Tensor]


class Recorder(Protocol):
    """What can repeat work on a device. A recording may be replayed any number of times, one after the other."""

    def first(self, work: Work) -> Tensor:
        """Does work whose like will be recorded."""
        ...

    def record(self, work: Work) -> tuple[Tensor, Callable[[], None]]:
        """Where the work, which is not done now, will put its result; and what does it, again and again."""
        ...

    def cost(self) -> str:
        """What recording took, in words."""
        ...


@attrs.frozen(kw_only=True, eq=False)
class Recording:
    """replay: does the work. loss, gradients, terms: where it puts what Python has to know of; see the module."""

    replay: Callable[[], None]
    loss: Tensor
    gradients: list[tuple[torch.nn.Parameter, Tensor]]
    terms: list[tuple[Balance, Tensor]]


class Microbatch:
    """The microbatches of one rank's training.

    sequences, sequence_length: B and S of each. tokens_per_step: T_step. document_mask: attention stays within a
    document. ranks: those that have the others. recorder: None has Python do every one.
    """

    def __init__(
        self,
        *,
        model: Transformer,
        ranks: "Alone | Reduction",
        sequences: int,
        sequence_length: int,
        tokens_per_step: int,
        document_mask: bool,
        device: torch.device,
        recorder: Recorder | None,
    ) -> None:
        self.model, self.ranks, self.document_mask = model, ranks, document_mask
        self.recorder, self.sequences = recorder, sequences
        self.scale = torch.full((), 1.0 / tokens_per_step, device=device)
        shape, kept = (sequences, sequence_length), device.type != "cpu" or recorder is not None
        self.inputs = [torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(3)] if kept else None
        self.steps, self.told = 0, False
        self.recordings: list[Recording] = []

    def run(
        self, input_ids_BS: Tensor, targets_BS: Tensor, document_ids_BS: Tensor, *, begins: bool,
        observe: Callable[[str], None],
    ) -> Tensor:  # fmt: skip
        """The loss in nats, a float32 scalar without gradient; the gradients are in `grad`, or shown to the ranks.

        The inputs: (B, S) int64, on the CPU. begins: this is the step's first, and no parameter has a gradient.
        observe is told "forward" and "backward" as each begins; a replay has no point between them.
        Raises what `Recorder.record` does.
        """
        inputs = [input_ids_BS, targets_BS, document_ids_BS]
        if self.inputs is not None:
            for kept, given in zip(self.inputs, inputs, strict=True):
                put(kept, given)
            inputs = self.inputs
        self.steps += begins
        if self.recorder is None:
            return self._work(inputs, observe)
        if self.steps == 1:
            return self.recorder.first(lambda: self._work(inputs, observe))
        number = 0 if begins else 1
        if number == len(self.recordings):  # only now is everything as it will be at each such microbatch
            self.recordings.append(self._record(self.recorder, inputs))
        recording = self.recordings[number]
        observe("forward")
        recording.replay()
        observe("backward")
        for parameter, gradient in recording.gradients:
            parameter.grad = gradient
        for balance, terms_L in recording.terms:
            balance.add(input_ids_BS.numel(), terms_L.clone())
        return recording.loss.clone()

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Within it Python does every microbatch, in the memory of the recordings, which are made anew behind it.

        They are not made before another whole step has been Python's, so that work which is different now and then
        is not recorded every time.
        """
        self.recordings, self.steps = [], 0
        try:
            yield
        finally:
            self.recordings, self.steps = [], 0

    def news(self) -> str | None:
        """What the recordings have cost, asked for the first time since they were made."""
        if self.told or self.recorder is None or not self.recordings:
            return None
        self.told = True
        return self.recorder.cost()

    def _work(self, inputs: list[Tensor], observe: Callable[[str], None]) -> Tensor:
        """Forward, loss and backward."""
        input_ids_BS, targets_BS, document_ids_BS = inputs
        head_VD = self.model.head.weight_VD
        self.ranks.open()
        observe("forward")
        h_TD = self.model(input_ids_BS, document_ids_BS if self.document_mask else None)
        loss = linear_cross_entropy(h_TD, head_VD, targets_BS.reshape(-1), chunk_tokens=chunk_of(head_VD))
        observe("backward")
        loss.backward(gradient=self.scale)
        self.ranks.show()
        return loss.detach()

    def _record(self, recorder: Recorder, inputs: list[Tensor]) -> Recording:
        """The next recording: the first begins the gradients, the second continues those that the first has made."""
        loss, replay = recorder.record(lambda: self._work(inputs, lambda phase: None))
        balances = [router.balance for _, router in routers_of(self.model)]
        return Recording(
            replay=replay,
            loss=loss,
            gradients=[(p, p.grad) for p in self.model.parameters() if p.grad is not None],
            terms=[(one, one.take_back(inputs[0].numel())) for one in balances if one is not None],
        )


def put(kept: Tensor, given: Tensor) -> None:
    """The device copies from pinned memory when its turn comes, and the host goes on."""
    kept.copy_(given if kept.device.type == "cpu" else given.pin_memory(), non_blocking=True)
