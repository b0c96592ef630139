"""Has a router collapsed? A named threshold, held for a window of consecutive steps, layer by layer.

    dead_share    experts without a token in the step / E  >=  the threshold
    max_load      the largest load over the mean load      >=  the threshold

A finding is made in the step that fills the window, once: there is no other before the figure has
been below its threshold again. The count of steps begins anew with each attempt at a run; it is no
part of the state, because it cannot change a bit of training.
"""

from collections.abc import Mapping

import attrs

from nmoe.errors import RunError, fail
from nmoe.metrics.router_health import Health


@attrs.frozen(kw_only=True)
class Collapse:
    """One layer's router has been past one threshold for `window` steps up to `step`, where the figure is `value`."""

    step: int
    layer: int
    figure: str
    value: float
    threshold: float
    window: int

    def __str__(self) -> str:
        steps = "in this step" if self.window == 1 else f"for {self.window} steps"
        if self.figure == "dead_share":
            what = f"{self.value:.3g} of its experts had no token, at least {self.threshold:g} {steps}"
        else:
            what = f"one expert had {self.value:.3g} times the mean load, at least {self.threshold:g} {steps}"
        return f"the router of layer {self.layer} has collapsed: {what}"


class CollapseDetector:
    """Looks at every step's health. dead_share, max_load: thresholds, None for none; window: in steps."""

    def __init__(self, *, dead_share: float | None, max_load: float | None, window: int) -> None:
        named = {"dead_share": dead_share, "max_load": max_load}
        self.thresholds = {figure: value for figure, value in named.items() if value is not None}
        self.window = window
        self._steps: dict[tuple[int, str], int] = {}

    def look(self, step: int, layers: Mapping[int, Health]) -> list[Collapse]:
        """The findings of a finished step, by layer; called once for each step, in their order."""
        found = []
        for layer, health in layers.items():
            values = {"dead_share": health.dead_share, "max_load": health.load_max}
            for figure, threshold in self.thresholds.items():
                past = values[figure] >= threshold
                held = self._steps.get((layer, figure), 0) + 1 if past else 0
                self._steps[layer, figure] = held
                if held == self.window:
                    found.append(
                        Collapse(
                            step=step, layer=layer, figure=figure, value=values[figure], threshold=threshold,
                            window=self.window,
                        )
                    )
        return found


def stopped(found: list[Collapse], *, run: str) -> RunError:
    """RunError N0508 for findings that stop the run; the way out holds whatever was saved last."""
    first, *rest = found
    return fail(
        "N0508", str(first), place=f"step {first.step} of {run}",
        help="change or remove [output.router_collapse] and train on from the last checkpoint, or balance the router "
        "in another run",
        notes=[str(one) for one in rest],
    )
