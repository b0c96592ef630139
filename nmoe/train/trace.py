"""The trace of single steps: what the host did and what the device ran, on one line of time.

    RUN/traces/step_XXXXXXXX.rankR.json.gz

is Chrome's format of trace events, which https://ui.perfetto.dev opens. The phases of the step stand in it by their
names. Tracing launches nothing on the device and draws no random number, so that it changes no bit; it takes time.
A step that is repeated, by a continued run, replaces its trace.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from nmoe.errors import fail
from nmoe.train.step import Observer

DIRECTORY = "traces"


class Tracer:
    """steps: those that are traced. observe: who is told of the phases besides."""

    def __init__(
        self, run: Path, *, steps: tuple[int, ...], rank: int, device_type: str, observe: Observer
    ) -> None:
        self.directory, self.steps, self.rank = run / DIRECTORY, frozenset(steps), rank
        self.device_type, self.tell = device_type, observe
        self.phase: record_function | None = None
        self.is_tracing = False

    def observe(self, step: int, phase: str) -> None:
        """Told as each phase of a step begins; it ends where the next begins."""
        if self.is_tracing:
            self._end_phase()
            self.phase = record_function(phase)
            self.phase.__enter__()
        self.tell(step, phase)

    def _end_phase(self) -> None:
        if self.phase is not None:
            self.phase.__exit__(None, None, None)
        self.phase = None

    @contextmanager
    def of(self, step: int) -> Iterator[None]:
        """The trace of what runs inside, if the step is one of those. RunError N0301 if it cannot be written."""
        if step not in self.steps:
            yield
            return
        kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (self.device_type != "cpu")]
        with profile(activities=kinds) as found:
            self.is_tracing = True
            try:
                yield
            finally:
                self._end_phase()
                self.is_tracing = False
            if self.device_type != "cpu":
                torch.cuda.synchronize()
        name = f"step_{step:08}.rank{self.rank}"
        # The profiler compresses where the name says so; a name that is whole is a trace that is.
        partial = self.directory / f".{name}.json.gz"
        try:
            self.directory.mkdir(exist_ok=True)
            found.export_chrome_trace(str(partial))
            partial.replace(self.directory / f"{name}.json.gz")
        except OSError as error:
            raise fail(
                "N0301", f"a trace cannot be written: {(error.strerror or str(error)).lower()}", place=str(partial),
                help="make room there, or remove profile_steps from [output]",
            ) from error  # fmt: skip
