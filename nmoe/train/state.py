"""Where a training stands: the counters that, with the graph's tensors, are the whole of exact resume.

Each counter is saved under its own name and read back by the part that uses it. They advance
together, so any one of them lost or shifted changes the bits that follow, and the gate sees it.
"""

from typing import Any

import attrs

from nmoe.errors import fail
from nmoe.graph import TrainingGraph

WAY_OUT = "no program of nmoe writes such a checkpoint: go back to a copy, or start another run in another `run_dir`"


@attrs.define(kw_only=True)
class TrainState:
    """step: finished steps. tokens_seen: the schedule's position. next_batch: the loader's position."""

    step: int = 0
    tokens_seen: int = 0
    next_batch: int = 1

    def advance(self, tokens: int) -> None:
        """One step over `tokens` tokens has been finished."""
        self.step += 1
        self.tokens_seen += tokens
        self.next_batch += 1

    def scalars(self, graph: TrainingGraph) -> dict[str, Any]:
        """What a checkpoint records beside the tensors."""
        return {
            "step": self.step,
            "schedule": {"tokens_seen": self.tokens_seen},
            "loader": {"next_batch": self.next_batch},
            "rng": {"rounding": graph.rounding.counter},
        }

    @classmethod
    def restore(cls, scalars: dict[str, Any], graph: TrainingGraph, *, step: int) -> "TrainState":
        """The state that `scalars` recorded; sets the graph's random streams to it.

        step: the one that the checkpoint goes by. RunError N0503 if a counter is missing, unknown or no count,
        or the steps differ.
        """
        try:
            _require_only(scalars, ("step", "schedule", "loader", "rng"))
            _require_only(scalars["rng"], ("rounding",))
            _require_only(scalars["schedule"], ("tokens_seen",))
            _require_only(scalars["loader"], ("next_batch",))
            graph.rounding.counter = _count(scalars["rng"]["rounding"])
            state = cls(
                step=_count(scalars["step"]),
                tokens_seen=_count(scalars["schedule"]["tokens_seen"]),
                next_batch=_count(scalars["loader"]["next_batch"]),
            )
        except (KeyError, TypeError) as error:
            raise fail(
                "N0503", f"the checkpoint's training state lacks or misstates {error}",
                help=WAY_OUT,
            ) from error
        if state.step != step:
            raise fail(
                "N0503", f"the checkpoint of step {step} says that {state.step} steps are finished", help=WAY_OUT
            )
        return state


def _require_only(counters: Any, names: tuple[str, ...]) -> None:
    """What a later version would read and this one does not is no state that it can go on from."""
    if not isinstance(counters, dict) or (unknown := counters.keys() - set(names)):
        raise TypeError(f"a counter `{sorted(unknown)[0][:80]}`" if isinstance(counters, dict) else "its counters")


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**53:
        raise TypeError(f"a counter that reads {value!r}")
    return value
