"""RUN/error.json: why an attempt ended, for programs and for people who come later.

Each rank that fails and still can writes its own: rank 0 `error.json`, rank R `error.rankR.json`. The first
cause stands in all of them, whoever it was: ranks tell each other why they end. The next attempt
removes them.
"""

import json
import traceback
from pathlib import Path
from typing import Any

from nmoe.checkpoint import disk
from nmoe.errors import NmoeError
from nmoe.train.run_lock import now

PATTERNS = ("error*.json", "error*.json.tmp")  # the second: there was no room to write the first


def path(run: Path, rank: int) -> Path:
    return run / ("error.json" if rank == 0 else f"error.rank{rank}.json")


def record(run: Path, error: BaseException, *, rank: int, ranks: int, lineage: str, attempt: int, step: int) -> None:
    """Write this rank's; step: the last that was finished. What cannot be written becomes a note of the error."""
    found: dict[str, Any] = {
        "time": now(), "lineage": lineage, "attempt": attempt, "rank": rank, "ranks": ranks, "step": step,
    }  # fmt: skip
    if isinstance(error, NmoeError):
        found["errors"] = [
            {"code": d.code, "message": d.message, "place": d.place, "help": d.help, "notes": list(d.notes)}
            for d in error.diagnostics
        ]
    else:
        found["errors"] = [{"code": None, "message": f"{type(error).__name__}: {error}"}]
        found["traceback"] = traceback.format_exception(error)
    found["notes"] = list(getattr(error, "__notes__", ()))
    try:
        disk.replace(path(run, rank), json.dumps(found, indent=1).encode() + b"\n")
    except NmoeError as second:
        error.add_note(f"why it failed could not be kept: {second}")


def clear(run: Path) -> None:
    """Remove what the attempt before has left."""
    for pattern in PATTERNS:
        for file in run.glob(pattern):
            disk.remove(file)
