"""RUN/events.jsonl: what has happened to a run, one JSON object a line, each durable before anything follows.

Every event has `time` (UTC), `event`, `lineage` and `attempt`. A kill can tear the last line only; the
next owner cuts the torn end off and says so in an event of its own. The ledger is also where the
attempt counter and the lineage live: the last line has them.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import attrs

from nmoe import strict_json
from nmoe.checkpoint import disk
from nmoe.checkpoint.disk import Damage
from nmoe.errors import fail
from nmoe.train.run_lock import now

NAME = "events.jsonl"
LIMIT = 1 << 30
LINEAGE = re.compile(r"[0-9a-f]{32}")
ATTEMPTS = 2**31 - 2
"""The ledger counts them in 32 bits, and there has to be a next one."""
OF_A_STEP = ("saving", "stop", "rewind")
"""Events that name the step that they are about."""


@attrs.frozen(kw_only=True)
class Past:
    """What the events say of a run so far. lineage is empty and attempt 0 where there are none."""

    lineage: str
    attempt: int
    events: tuple[dict[str, Any], ...]

    @property
    def saved(self) -> int:
        """The step that HEAD has come to for certain since it was last moved back openly; 0 if there is none.

        A stop is told when the last save is whole, and a save of an attempt when the one before it is.
        """
        saved, begun = 0, (0, 0)
        for event in self.events:
            attempt = event["attempt"]
            if event["event"] in ("stop", "rewind"):
                saved = event["step"]
            elif event["event"] == "saving":
                saved = begun[1] if begun[0] == attempt else saved
                begun = (attempt, event["step"])
        return saved


def read(run: Path) -> Past:
    """The events up to a torn end, if there is one. RunError N0316 for a line that no writer leaves."""
    content, _ = _split(run)
    events = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            event = _event(line)
        except ValueError as cause:
            raise fail(
                "N0316", f"line {number} of the run's events cannot be read: {cause}", place=str(run / NAME),
                help="restore the file from a copy, or remove the line: what it told is lost, and no state is touched",
            ) from cause  # fmt: skip
        events.append(event)
    return Past(
        lineage=events[-1]["lineage"] if events else "",
        attempt=max((event["attempt"] for event in events), default=0),
        events=tuple(events),
    )


def _event(line: bytes) -> dict[str, Any]:
    """One line; ValueError for what no writer leaves."""
    event = strict_json.loads(line)
    if not isinstance(event, dict):
        raise ValueError("an event is an object")
    if not all(isinstance(event.get(key), str) for key in ("time", "event", "lineage")):
        raise ValueError("an event, its time and its lineage are texts")
    if not LINEAGE.fullmatch(event["lineage"]):
        raise ValueError("a lineage is 32 hex digits")
    if type(event.get("attempt")) is not int or not 1 <= event["attempt"] <= ATTEMPTS:
        raise ValueError(f"an attempt is a number from 1 to {ATTEMPTS}")
    step = event.get("step", None if event["event"] in OF_A_STEP else 0)
    if type(step) is not int or not 0 <= step < 2**53:
        raise ValueError("a step is a count")
    return event


def repair(run: Path) -> str:
    """Cuts a torn last line off and returns it, '' if there was none. Only the run's owner may call it."""
    content, torn = _split(run)
    if torn:
        with disk.naming("repair", run / NAME):
            descriptor = os.open(run / NAME, os.O_WRONLY)
            try:
                os.ftruncate(descriptor, len(content))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    return torn.decode("utf-8", errors="replace")


def append(run: Path, event: str, *, lineage: str, attempt: int, **fields: Any) -> None:
    """Adds one event, durably. fields: anything that JSON can say, finite numbers only."""
    record = {"time": now(), "event": event, "lineage": lineage, "attempt": attempt, **fields}
    line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    path = run / NAME
    is_new = not path.exists()
    with disk.naming("append to", path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            disk.write_all(descriptor, line)
        finally:
            os.close(descriptor)
    if is_new:
        disk.sync_directory(run)


def _split(run: Path) -> tuple[bytes, bytes]:
    """(whole lines, torn end) of the file; nothing where there is no file."""
    if not (run / NAME).exists():
        return b"", b""
    try:
        content = disk.read(run / NAME, limit=LIMIT)
    except Damage as damage:
        raise fail(
            "N0316", f"the run's events cannot be read: the file {damage}", place=str(run / NAME),
            help=f"move it away; nmoe verify {run} --rewind then begins it anew from the checkpoints",
        ) from damage  # fmt: skip
    end = content.rfind(b"\n") + 1
    return content[:end], content[end:]
