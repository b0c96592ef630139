"""What a person sees of a run: one line that renews itself on a terminal, plain lines elsewhere.

    step  120/640   18.8%  loss 1.8720  2.700 bits/byte  ETA 3m12s (14:05:11)  10.4k tok/s   0.98M tokens

What matters most stands first: a terminal narrower than the line cuts its end off. All of it goes to
stderr; stdout is for results.
"""

import sys
import time
from typing import TextIO

from nmoe import platform
from nmoe.metrics.throughput import Throughput


def count(value: float) -> str:
    """A count with three figures and its SI letter: 10.4k, 0.98M."""
    for limit, divisor, letter in ((1e3, 1, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M"), (1e12, 1e9, "B")):
        if value < limit * 0.9995:
            scaled = value / divisor
            digits = 0 if letter == "" else (2 if scaled < 10 else 1 if scaled < 100 else 0)
            return f"{scaled:.{digits}f}{letter}"
    return f"{value / 1e12:.2f}T"


def finish(eta: float) -> str:
    """The local time after `eta` seconds from now; with its day where that is a day or more."""
    return time.strftime("%H:%M:%S" if eta < 86400 else "%Y-%m-%d %H:%M", time.localtime(time.time() + eta))


def duration(seconds: float) -> str:
    """A span of time in its two largest units: 3m12s, 2h05m, 4d06h."""
    whole = max(int(seconds + 0.5), 0)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


class Progress:
    """Writes the state of a run to stderr.

    every: steps between lines where stderr is no terminal. On a terminal each step renews the line. silent: of
    several ranks one speaks.
    """

    def __init__(
        self, *, total_steps: int, total_tokens: int, every: int, stream: TextIO | None = None, silent: bool = False
    ):
        self.total_steps = total_steps
        self.total_tokens = total_tokens
        self.every = every
        self.stream = sys.stderr if stream is None else stream
        self.silent = silent
        self.live = not silent and platform.is_terminal(self.stream)
        self._open_line = False

    def step(self, step: int, tokens_seen: int, loss: float, bits_per_byte: float, rate: Throughput) -> None:
        """One finished step."""
        last = step == self.total_steps
        if self.silent or (not self.live and step % self.every and not last and step != 1):
            return
        eta = rate.eta_seconds(self.total_tokens - tokens_seen)
        width = len(str(self.total_steps))
        share = 100.0 * min(tokens_seen / self.total_tokens, 1.0)
        text = (
            f"step {step:>{width}}/{self.total_steps}  {share:5.1f}%  loss {loss:.4f}  {bits_per_byte:.3f} bits/byte  "
            f"ETA {duration(eta)} ({finish(eta)})  {count(rate.tokens_per_second):>5} tok/s  "
            f"{count(tokens_seen):>6} tokens"
        )
        if self.live:
            self._renew(text)
        else:
            self.stream.write(text + "\n")
            self.stream.flush()

    def transient(self, text: str) -> None:
        """Something that is under way: shown on a terminal only, until the next line."""
        if self.live:
            self._renew(text)

    def _renew(self, text: str) -> None:
        # A line that wraps could not be renewed.
        self.stream.write(f"\r\x1b[2K{text[: platform.terminal_width(self.stream) - 1]}")
        self.stream.flush()
        self._open_line = True

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.silent:
            return
        if self._open_line:
            self.stream.write("\r\x1b[2K")
            self._open_line = False
        self.stream.write(text + "\n")
        self.stream.flush()

    def close(self) -> None:
        """Leave the last line standing."""
        if self._open_line:
            self.stream.write("\n")
            self._open_line = False
            self.stream.flush()
