"""What is odd about a training's batches, or wrong with its arithmetic, on all ranks alike; no error tells of it."""

import itertools
from contextlib import contextmanager

import attrs
import torch

from nmoe.checkpoint import environment
from nmoe.data.loader import Loader
from nmoe.model import microbatch
from nmoe.optim.reduction import Reduction
from nmoe.train import attempt, step


def cancelling() -> None:
    """Microbatch 1 is microbatch 0 again, and their losses weigh 1e4 and -1e4, the others' 1.

    So the first two gradients cancel, and whoever adds in another order loses digits of the others.
    """
    make, loss, run = Loader.batch, microbatch.linear_cross_entropy, step.run_step
    numbers = itertools.count()

    def batch(self, number):
        made = make(self, number)
        size = self.microbatch
        for t in (made.input_ids_BS, made.targets_BS, made.document_ids_BS):
            t[size : 2 * size] = t[:size]
        return made

    def weighted(*given, **more):
        return loss(*given, **more) * {0: 1e4, 1: -1e4}.get(next(numbers), 1.0)

    def run_step(graph, *given, **more):
        nonlocal numbers
        numbers = itertools.count(graph.ranks.rank, graph.ranks.ranks)
        return run(graph, *given, **more)

    Loader.batch, microbatch.linear_cross_entropy, attempt.run_step = batch, weighted, run_step


def short_documents() -> None:
    """Documents of a few tokens each, of another length in each row; the text's own are longer than these trainings."""
    make = Loader.batch

    def batch(self, number):
        made = make(self, number)
        for row, ids_S in enumerate(made.document_ids_BS):
            ids_S.copy_(torch.arange(len(ids_S)) // (3 + row))
        return made

    Loader.batch = batch


def other_order() -> None:
    """A fault: the ranks' parts are added from the last rank to the first."""
    make = Reduction.__init__

    def backwards(self, **given):
        make(self, **given)
        self.parts.reverse()

    Reduction.__init__ = backwards


def other_microbatch() -> None:
    """A fault: every rank takes the microbatch of the rank before it."""
    run = step.run_step

    def run_step(graph, batch, **more):
        turn = {
            name: getattr(batch, name).roll(graph.microbatch.sequences, dims=0)
            for name in ("input_ids_BS", "targets_BS", "document_ids_BS")
        }
        return run(graph, attrs.evolve(batch, **turn), **more)

    attempt.run_step = run_step


def other_source() -> None:
    """The environment record says that a file of the arithmetic is another; it is not."""
    read = environment.source_hashes
    environment.source_hashes = lambda: {**read(), "model/moe.py": "0" * 64}
class FullArena:
    """What `nmoe.rdep.arena.Arena` is to a step: one in which no microbatch has room at the second of the ranks."""

    rows, alone = 100, False

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def clear(self) -> None:
        pass

    def needed(self) -> int:
        return 101 if self.rank == 1 else 100

    @contextmanager
    def each_layer_alone(self):
        self.alone = True
        yield
        self.alone = False


def no_room() -> None:
    """Every step's passes are worth nothing, as only the arena's verdict tells, until each layer is alone."""
    make, loss = attempt.build, microbatch.linear_cross_entropy
    arenas = []

    def build(*given):
        graph = make(*given)
        arenas.append(FullArena(graph.ranks.rank))
        for block in graph.model.layers:
            if block.moe is not None:
                block.moe.transport.arena = arenas[0]
        return attrs.evolve(graph, arena=arenas[0])

    def spoiled(*given, **more):
        return loss(*given, **more) * (1.0 if arenas[0].alone else 1e3)

    attempt.build, microbatch.linear_cross_entropy = build, spoiled


ODD = {
    "cancelling": cancelling, "short documents": short_documents,
    "no room": no_room, "other order": other_order, "other microbatch": other_microbatch,
    "other source": other_source,
}  # fmt: skip
