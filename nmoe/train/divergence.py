"""Do all ranks still have the same weights and router biases?

Compared are digests (`nmoe.optim.replicas`), every [output] divergence_every steps and before every checkpoint.

In a step it is done when backward is over and nothing has been updated: the copies are those that forward and
backward have used. At the end of every step each copy is overwritten with what its owner has made of it. So this
finds, at the next comparison, a bias that has parted, which stays so, and a copy that goes wrong in every step or in
the one that compares. It cannot find a bit that flips in a copy in a step that does not compare and is gone after it:
that reaches the gradients of one rank, and through their sum the weights of all (with divergence_every = 1 there is no
such step). Nor can it judge what only one rank has, masters, moments and, on one node, experts: they are held against
their hashes when a checkpoint is read, where they have landed (`nmoe.checkpoint.reader`).

A state that is saved has passed a comparison since its last update, so HEAD never names one that was not alike.
"""

from collections.abc import Sequence

from torch import Tensor

from nmoe.errors import RunError, fail
from nmoe.graph import TrainingGraph
from nmoe.optim.reduction import Alone
from nmoe.optim.replicas import Odd

NOTES = 12


def require_alike(graph: TrainingGraph, *, step: int) -> None:
    """RunError N0510, on all ranks, if they do not hold the same after that step; all ranks ask together."""
    if not isinstance(graph.ranks, Alone):
        judge(graph, graph.ranks.gather(graph.replicas.halves().cpu()), place=f"after step {step}, before it is saved")


def judge(graph: TrainingGraph, halves_N: Sequence[Tensor], *, place: str) -> None:
    """The same of digests that the ranks have told each other."""
    odd = graph.replicas.odd(halves_N)
    if odd:
        raise _parted(odd, place)


def _parted(odd: Sequence[Odd], place: str) -> RunError:
    first, more = odd[0], f", and {len(odd) - 1} tensors more" if odd[1:] else ""
    minority = sorted({rank for one in odd for rank in one.minority})
    suspects = f"of {_ranks(minority)}" if minority else "of the ranks that differ"
    return fail(
        "N0510",
        f"the ranks do not hold the same `{first.name}`: {_who(first)}{more}",
        place=place,
        help="the last checkpoint was saved when all were alike, and the same command goes on from it; if it happens "
        f"again, test the memory and the device {suspects}",
        notes=[f"`{one.name}`: {_who(one)}" for one in odd[1:NOTES]],
    )


def _who(one: Odd) -> str:
    most, *others = one.holders
    if one.minority:
        return f"{_ranks(one.minority)} {'have' if one.minority[1:] else 'has'} other bits than {_ranks(most)}"
    return f"{_ranks(most)} and {' and '.join(_ranks(ranks) for ranks in others)} have different bits"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if ranks[1:] else ''} {', '.join(map(str, ranks))}"
