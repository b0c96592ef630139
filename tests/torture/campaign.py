"""Campaigns against what must never happen: crash points, power cuts, faults, corruptions, kills, foreign files.

A subject is a module of this folder that says what it tries and how one loses:

    TITLE                     its row in the table, "kill points x configs x ranks / bitwise identical", say
    batches(sample) -> [Batch]   all of it, or a fast sample that `make test` runs

A batch is a few seconds to a few minutes of work in a process of its own, forked from one that has imported torch, with
an empty directory. It returns what it tried and what it lost; whatever it raises is a loss too. What a batch tries
follows from its name: nothing is drawn that is not seeded by it.

`python -m tests.torture` runs whatever its notes (.torture/, a line for each batch that has ended) do not have yet for
this code, and then writes results.json and the README's table.
"""

import hashlib
import importlib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import attrs

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results.json")
SUBJECTS: tuple[str, ...] = (
    "crash", "power", "faults", "corruption", "kills", "metrics", "signals", "fuzz",
)  # fmt: skip
BATCH_S = 1800
CODE = ("nmoe", "registry", "tests/torture", "tests/train", "tests/checkpoint", "tests/rdep")
BENCH = ROOT / "nmoe" / "bench"


@attrs.frozen(kw_only=True)
class Tally:
    """tried: how many. lost: one line for each that was not as it must be. notes: figures beside them, by name."""

    tried: int
    lost: tuple[str, ...] = ()
    notes: dict[str, float] = attrs.field(factory=dict)


@attrs.frozen
class Batch:
    """name: unique in its subject. run: given an empty directory of its own."""

    name: str
    run: Callable[[Path], Tally]


def subject(name: str) -> ModuleType:
    return importlib.import_module(f"tests.torture.{name}")


def code() -> str:
    """The digest of everything that a campaign runs: the package but for its bench, the registry, the campaigns."""
    found = hashlib.sha256()
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if BENCH in path.parents:
                continue
            found.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def run(
    batches: list[Batch], jobs: int = 1, until: float = math.inf
) -> Iterator[tuple[Batch, Tally, float]]:
    """Each batch with what it came to and the seconds that it took, as they end; `jobs` at once.

    until: none is begun after that moment of the monotonic clock.
    """
    waiting, running = list(reversed(batches)), {}
    while running or (waiting and time.monotonic() < until):
        while waiting and len(running) < jobs and time.monotonic() < until:
            batch, directory = waiting.pop(), Path(tempfile.mkdtemp(prefix="torture-"))
            sys.stdout.flush()
            child = os.fork()
            if child == 0:
                _be(batch, directory)
            running[child] = batch, directory, time.monotonic()
        child, status = os.wait()
        batch, directory, started = running.pop(child)
        yield batch, _answer(directory, status), time.monotonic() - started
        shutil.rmtree(directory, ignore_errors=True)


def _be(batch: Batch, directory: Path) -> None:
    """One batch, from its fork to its end; it leads a group of processes, so that none outlives it unseen."""
    code = 1
    try:
        os.setpgid(0, 0)
        # What a test runner has put in their place would not follow where a batch sends its descriptors 1 and 2.
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        signal.alarm(BATCH_S)
        own = directory / "work"
        own.mkdir()
        found = attrs.asdict(batch.run(own))
        (directory / "tally.json").write_text(json.dumps(found))
        code = 0
    except BaseException:
        (directory / "raised.txt").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def _answer(directory: Path, status: int) -> Tally:
    file, raised = directory / "tally.json", directory / "raised.txt"
    if os.waitstatus_to_exitcode(status) == 0 and file.exists():
        found = json.loads(file.read_text())
        return Tally(tried=found["tried"], lost=tuple(found["lost"]), notes=found["notes"])
    text = raised.read_text() if raised.exists() else f"the batch ended with status {status}"
    return Tally(tried=1, lost=(text,))


@attrs.frozen(kw_only=True)
class Total:
    """Of one subject. code: what it was run on, as `code`; date: of its last batch. share: of its batches."""

    title: str
    tried: int
    lost: tuple[str, ...]
    notes: dict[str, float]
    seconds: float
    code: str
    date: str
    share: float


def table(totals: dict[str, Total]) -> str:
    """For the README: one row a subject that has been tried."""
    rows = ["| what is tried | tried | lost |", "|---|---|---|"]
    for name, total in ((name, totals[name]) for name in SUBJECTS if name in totals):
        beside = "".join(f"; {key} {value:,.4g}" for key, value in total.notes.items())
        part = "" if total.share == 1 else f" ({total.share:.0%} of all)"
        rows.append(f"| {total.title} (`{name}`) | {total.tried:,}{part} | {len(total.lost)}{beside} |")
    return "\n".join(rows)


def read_results() -> dict[str, Total]:
    found = json.loads(RESULTS.read_text())
    return {name: Total(**{**one, "lost": tuple(one["lost"])}) for name, one in found.items()}
