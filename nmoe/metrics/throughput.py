"""How fast a run goes, and when it will be done.

The smoothed rate is over the last 64 steps. A stall (a suspended machine, a page cache that had to
be filled) is one interval many times the others; each interval counts for at most four times the
median, so that a stall moves the rate a little for a while and not by itself.

Evaluations and checkpoints are no part of a step's time. They return, though, so the time to the end
is stretched by the share they have had of this attempt so far.
"""

from collections import deque
from statistics import median

from nmoe.errors import fail

WINDOW = 64
"""Steps that the smoothed rate looks back on."""

STALL = 4.0
"""An interval counts for at most this many medians."""


class Throughput:
    """Takes each step's tokens and seconds, gives rates. It reads no clock itself."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self._busy = 0.0
        self._paused = 0.0

    def step(self, tokens: int, seconds: float) -> None:
        """One finished step: its tokens, and the wall time since the step before it, pauses taken out."""
        if tokens <= 0 or not seconds > 0.0:
            raise fail(
                "N0407",
                f"a step of {tokens} tokens in {seconds} s has no rate",
                place="throughput",
                help="measure with a monotonic clock",
            )
        self._steps.append((tokens, seconds))
        self._busy += seconds

    def pause(self, seconds: float) -> None:
        """Time that an evaluation or a checkpoint took."""
        self._paused += seconds

    @property
    def tokens_per_second(self) -> float:
        """The smoothed rate; 0 before the first step."""
        if not self._steps:
            return 0.0
        limit = STALL * median(seconds for _, seconds in self._steps)
        return sum(tokens for tokens, _ in self._steps) / sum(min(seconds, limit) for _, seconds in self._steps)

    def eta_seconds(self, remaining_tokens: int) -> float:
        """Seconds until `remaining_tokens` more tokens are done; 0 for none left, infinite before a step."""
        if remaining_tokens <= 0:
            return 0.0
        if not self._steps:
            return float("inf")
        return remaining_tokens / self.tokens_per_second * (1.0 + self._paused / self._busy)

    def finish_ns(self, now_ns: int, remaining_tokens: int) -> int:
        """The Unix time, in nanoseconds, at which they will be done; needs a step."""
        return now_ns + round(self.eta_seconds(remaining_tokens) * 1e9)
