"""Signals ask; the loop answers at a step's end.

SIGINT, SIGTERM and SIGUSR1 set a flag on the rank that gets them. The ranks tell each other in every step; they
finish it, a checkpoint is saved, and all exit with 130. A second signal changes nothing: the save is already on
its way. So it is from the first moment of a start by several ranks, which look before their first step: a rank that
went away by itself would leave the others waiting. One rank alone has nothing to agree on, and until its first
step a signal ends it at once.
"""

import signal
from types import FrameType

WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether somebody has asked this process to stop, and by which signal (0: nobody). Use as a context manager.

    at_once: a signal raises KeyboardInterrupt instead.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.number, self.at_once = 0, at_once

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in WATCHED}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.at_once:
            raise KeyboardInterrupt
        self.number = self.number or number
