"""Trainings on forked ranks that something befalls: a signal to one rank, at an instant that nobody has chosen.

Whatever could start a thread (a training, a reader of the ledger) runs in a child of its own, so that the batch itself
can go on forking.
"""

import ctypes
import json
import os
import random
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

import attrs
import torch._inductor as _inductor  # torch's deterministic mode imports it: once, before anything is forked

from nmoe.checkpoint import reader
from nmoe.checkpoint.verify import verify
from nmoe.train import loop
from tests.train import launches, work

assert _inductor

LIMIT_S = 240
CALLS = ("open", "write", "fsync", "rename", "mkdir", "unlink")
CLOCK_PROCESS_CPUTIME_ID = 2


@attrs.frozen
class Blow:
    """A signal to one rank, once it has used `after` seconds of processor time, come to its `after`th mark of a phase,
    or made its `after`th call of the file system."""

    rank: int
    number: int
    kind: str
    after: float


@attrs.frozen(kw_only=True)
class Size:
    """What one rank's run takes from its start to its end, by kind of blow."""

    seconds: float
    mark: float
    call: float


@attrs.frozen(kw_only=True)
class Ended:
    """codes: how each rank ended, minus the signal where one did. said: what each wrote."""

    codes: tuple[int, ...]
    said: tuple[str, ...]


def apart(act: Callable[[], object], log: Path) -> object:
    """What `act` returns, as JSON, from a process of its own."""
    log.parent.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            log.write_text(json.dumps(act()))
            code = 0
        except BaseException:
            log.write_text(traceback.format_exc())
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(log.read_text() if log.exists() else f"status {status}")
    return json.loads(log.read_text())


class Trainings:
    """Runs by name below one directory, all of one config."""

    def __init__(self, directory: Path, *sets: str, config: Path = launches.TINY, odd: str = "") -> None:
        self.directory, self.sets, self.config, self.odd = directory, sets, config, odd
        self.count = 0
        self.size = Size(seconds=1, mark=1, call=1)

    def runs(self) -> launches.Launches:
        """The same runs as the tests know them, to look at."""
        return launches.Launches(self.directory, None, self.config)

    def straight(self, name: str) -> None:
        """The run that nothing befalls, of one rank; what it took is `size`."""
        log = self._log()
        found = apart(lambda: self._measured(name, log), log / "size.json")
        self.size = Size(**found)

    def _measured(self, name: str, log: Path) -> dict[str, float]:
        marks, calls = _count_marks(lambda: None), _count_calls(lambda: None)
        code = self._be(name, 0, 1, (), log)
        if code:
            raise RuntimeError((log / "0.txt").read_text())
        used = os.times()
        return {"seconds": used.user + used.system, "mark": marks(), "call": calls()}

    def attempt(
        self, name: str, ranks: int, *sets: str, blow: Blow | None = None, group: bool = False, twice: bool = False
    ) -> Ended:
        """One launch of the run, and how its ranks ended by themselves. group: the signal goes to all of them."""
        log = self._log()
        children = {}
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                code = 99
                try:
                    if blow is not None and (rank == blow.rank or group):
                        arm(blow, twice=twice)
                    code = self._be(name, rank, ranks, sets, log)
                except BaseException:
                    (log / f"{rank}.txt").write_text(traceback.format_exc())
                finally:
                    os._exit(code)
            children[child] = rank
        codes: dict[int, int] = {}
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        hung = signal.signal(signal.SIGALRM, lambda *_: [os.kill(child, signal.SIGKILL) for child in children])
        before = signal.alarm(LIMIT_S)
        while children:
            child, status = os.wait()
            codes[children.pop(child)] = os.waitstatus_to_exitcode(status)
        signal.signal(signal.SIGALRM, hung)
        signal.alarm(before)
        files = [log / f"{rank}.txt" for rank in range(ranks)]
        return Ended(
            codes=tuple(codes[rank] for rank in range(ranks)),
            said=tuple(file.read_text() if file.exists() else "" for file in files),
        )

    def _be(self, name: str, rank: int, ranks: int, sets: tuple[str, ...], log: Path) -> int:
        store = work.store(str(log), ranks)
        run = self.directory / name
        keys = [*self.sets, f'output.run_dir="{run}"', f'output.metrics_dir="{run.parent / "metrics"}"', *sets]
        return work.training(
            rank=rank, ranks=ranks, store=store, config=str(self.config), sets=keys, log=str(log), odd=self.odd
        )

    def _log(self) -> Path:
        self.count += 1
        log = self.directory / "logs" / str(self.count)
        log.mkdir(parents=True)
        return log

    def left(self, name: str) -> list[tuple]:
        """All that the run has left which must not depend on what befell it; and its checkpoints must be whole."""
        return [tuple(row) for row in apart(lambda: self._left(name), self._log() / "left.json")]

    def _left(self, name: str) -> list[tuple]:
        found = verify(self.directory / name / "checkpoints")
        if found.faults:
            raise RuntimeError(f"{name}: {found.faults}")
        return self.runs().left(name)

    def head(self, name: str) -> int:
        """The step that HEAD names; 0 for a run without one."""
        checkpoints = self.directory / name / "checkpoints"
        return (reader.head_step(checkpoints) or 0) if checkpoints.exists() else 0

    def draw(self, random: random.Random, name: str, ranks: int, total: int, number: int) -> Blow:
        """A blow that falls, more likely than not, before the run's end."""
        kind = random.choice(("seconds", "seconds", "mark", "call"))
        left = max(1 - self.head(name) / total, 0.15)
        after = random.uniform(0.02, 0.9) * left * getattr(self.size, kind)
        rank = random.randrange(ranks)
        if kind == "call" and rank:
            after /= 8  # rank 0 writes what there is one of
        return Blow(rank, number, kind, after if kind == "seconds" else max(1, round(after)))


def arm(blow: Blow, *, twice: bool = False) -> None:
    """Makes the blow fall on this process; twice: another follows, a little later."""
    if blow.kind == "seconds":
        for after in (blow.after, blow.after * 1.05)[: 1 + twice]:
            _after_processor_time(blow.number, after)
        return
    left = [blow.after]

    def count() -> None:
        left[0] -= 1
        if left[0] == 0 or (twice and left[0] == -1):
            os.kill(os.getpid(), blow.number)

    {"mark": _count_marks, "call": _count_calls}[blow.kind](count)


def _count_marks(act: Callable[[], None]) -> Callable[[], int]:
    """`act` at every mark of a phase; how many there were."""
    real, seen = loop.train, []

    def observe(step: int, phase: str) -> None:
        seen.append(phase)
        act()

    loop.train = lambda *given, **more: real(*given, observe=observe, **more)
    return lambda: len(seen)


def _count_calls(act: Callable[[], None]) -> Callable[[], int]:
    """`act` before every call of the file system; how many there were."""
    seen: list[str] = []

    def counted(name: str) -> None:
        real = getattr(os, name)

        def call(*given, **more):
            seen.append(name)
            act()
            return real(*given, **more)

        setattr(os, name, call)

    for name in CALLS:
        counted(name)
    return lambda: len(seen)


class _Event(ctypes.Structure):
    """sigevent of <signal.h>, 64 bytes."""

    _fields_ = [("value", ctypes.c_void_p), ("number", ctypes.c_int), ("notify", ctypes.c_int),
                ("rest", ctypes.c_int * 12)]  # fmt: skip


def _after_processor_time(number: int, seconds: float) -> None:
    """The kernel sends `number` to this process once it has run for so long: at any instruction, of any thread."""
    library, timer = ctypes.CDLL(None, use_errno=True), ctypes.c_void_p()
    event = _Event(number=number, notify=0)
    whole, part = divmod(max(round(seconds * 1e9), 1), 10**9)
    times = (ctypes.c_long * 4)(0, 0, whole, part)  # itimerspec: no interval
    done = library.timer_create(CLOCK_PROCESS_CPUTIME_ID, ctypes.byref(event), ctypes.byref(timer))
    if done or library.timer_settime(timer, 0, ctypes.byref(times), None):
        raise OSError(ctypes.get_errno(), "timer_create")
