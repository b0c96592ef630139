"""What a fuzz case may come to: accepted, or refused in nmoe's own words; and the tally of many."""

import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import attrs

from nmoe.errors import NmoeError
from tests.torture.campaign import Tally

HANG_S = 120
KEPT = 40
CODE = re.compile(r"N\d{4}")


class Hang(BaseException):
    """A case has taken longer than anything that is no hang."""


@attrs.define
class Count:
    """accepted, refused: how many; tracebacks, wrong: how many, and the first of them in words."""

    accepted: int = 0
    refused: int = 0
    tracebacks: int = 0
    wrong: int = 0
    said: list[str] = attrs.field(factory=list)

    def case(self, what: str, call: Callable[[], Any], judge: Callable[[Any], Iterator[str]]) -> None:
        """One case. what: how to make it again. judge: what is wrong with an answer that was accepted."""
        try:
            with limited(HANG_S):
                answer = call()
        except NmoeError as error:
            self.refused += 1
            for fault in unfit(error):
                self.fault(what, fault)
            return
        except (Exception, Hang) as error:
            self.tracebacks += 1
            self.keep(f"{what}: {type(error).__name__}: {str(error)[:200]}")
            return
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of a library in Rust, which derives it so
                raise
            self.tracebacks += 1
            self.keep(f"{what}: {error}")
            return
        self.accepted += 1
        for fault in judge(answer):
            self.fault(what, fault)

    def fault(self, what: str, fault: str) -> None:
        self.wrong += 1
        self.keep(f"{what}: {fault}")

    def keep(self, text: str) -> None:
        if len(self.said) < KEPT:
            self.said.append(text.encode("ascii", "backslashreplace").decode()[:600])

    def tally(self) -> Tally:
        more = self.tracebacks + self.wrong - len(self.said)
        lost = (*self.said, *(f"and {number} more" for number in [more] if more))
        return Tally(
            tried=self.accepted + self.refused + self.tracebacks,
            lost=lost,
            notes={"accepted": self.accepted, "tracebacks": self.tracebacks, "wrongly accepted": self.wrong},
        )


def unfit(error: NmoeError) -> Iterator[str]:
    """What is wrong with how a refusal is said."""
    if error.exit_code not in (1, 2):
        yield f"exit status {error.exit_code}"
    if not error.diagnostics:
        yield "a refusal without a finding"
    for one in error.diagnostics:
        if not CODE.fullmatch(one.code) or not one.message:
            yield f"a finding without a code or message: {one!r:.200}"
    text = error.render()
    if len(text) > 1 << 20:
        yield f"a refusal of {len(text)} characters"
    odd = sorted({c for c in text if not c.isprintable() and c != "\n"})
    if odd:
        yield f"a refusal with the characters {odd!r:.80}"


def nothing(answer: Any) -> Iterator[str]:
    yield from ()


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Hang if the block has not ended by then; the batch's own alarm waits meanwhile."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    rest = signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(max(rest, 1) if rest else 0)
        signal.signal(signal.SIGALRM, before)
