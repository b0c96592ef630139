"""One owner: a run directory is written by one process at a time.

The kernel holds the lock (flock on RUN/lock) and lets go of it when the owner dies, however it dies. So
who gets the lock on the same running kernel has proof that the owner before is dead. RUN/owner.json
says who owns it; a clean end removes the record, which needs no space on a full disk. It serves the
message, and one more case: on a shared file system the owner may have run on another host, of which
this host's kernel proves nothing. A record that such an owner left keeps everybody out, until a
person has looked and removes it.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from nmoe import platform, strict_json
from nmoe.checkpoint import disk
from nmoe.checkpoint.disk import Damage
from nmoe.errors import fail

LOCK = "lock"
OWNER = "owner.json"


@attrs.frozen(kw_only=True)
class Owner:
    """A process that owns a run, or died owning it. started: UTC."""

    pid: int
    purpose: str
    host: str
    machine_id: str
    boot_id: str
    started: str

    def __str__(self) -> str:
        return f"{self.purpose}, pid {self.pid} on host {self.host}, since {self.started}"


def this_process(purpose: str) -> Owner:
    return Owner(
        pid=os.getpid(),
        purpose=purpose,
        host=platform.host_name(),
        machine_id=platform.machine_id(),
        boot_id=platform.boot_id(),
        started=now(),
    )


def now() -> str:
    """UTC, ISO 8601, to the millisecond."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


@contextlib.contextmanager
def owned(run: Path, purpose: str) -> Iterator[Owner | None]:
    """Owns the run directory inside the block. Yields the owner before if it died as such, else None.

    RunError N0311 names the owner that is alive, N0312 one on another host that may be, N0310 a
    file system that has no locks.
    """
    with _held(run, _lock(run)):
        before = read_owner(run)
        mine = this_process(purpose)
        if before is not None and not _proven_dead(before, mine):
            raise fail(
                "N0312", f"the run may still be owned by another host: {before}", place=str(run),
                help=f"look on {before.host} that the process is gone; then rm {run / OWNER}, and start again",
            )  # fmt: skip
        disk.replace(run / OWNER, json.dumps(attrs.asdict(mine), indent=1).encode() + b"\n")
        try:
            yield before
        finally:
            disk.remove(run / OWNER)
            disk.sync_directory(run)


@contextlib.contextmanager
def _held(run: Path, descriptor: int) -> Iterator[None]:
    """Closes the lock after the block. Some file systems fail there; beside the block's own failure that is a note."""
    try:
        yield
    except BaseException as failure:
        try:
            os.close(descriptor)
        except OSError as second:
            failure.add_note(str(disk.cannot("close", run / LOCK, second)))
        raise
    with disk.naming("close", run / LOCK):
        os.close(descriptor)


def read_owner(run: Path) -> Owner | None:
    """The record of the last owner, None if there is none; RunError N0312 if it cannot be read as one."""
    path = run / OWNER
    if not os.path.lexists(path):  # a link that leads nowhere is no proof either
        return None
    try:
        fields: Any = strict_json.loads(disk.read(path, limit=1 << 16))
        types = {field.name: field.type for field in attrs.fields(Owner)}
        if not isinstance(fields, dict) or fields.keys() != types.keys():
            raise ValueError("its keys are not those of an owner")
        if not all(type(value) is types[name] for name, value in fields.items()):
            raise ValueError("its values are not those of an owner")
        return Owner(**fields)
    except (Damage, ValueError) as cause:
        raise fail(
            "N0312", f"the record of the run's owner cannot be read: {cause}", place=str(path),
            help=f"make sure that no process trains this run; then rm {path}, and start again",
        ) from cause  # fmt: skip


def _proven_dead(before: Owner, mine: Owner) -> bool:
    """Whether holding the lock here proves it: same running kernel, or same machine after another boot."""
    if before.boot_id and before.boot_id == mine.boot_id:
        return True
    return (before.host, before.machine_id) == (mine.host, mine.machine_id)


def _lock(run: Path) -> int:
    """The descriptor that holds the lock; it is closed on exec, and by the kernel at death."""
    path = run / LOCK
    with disk.naming("open", path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as cause:
        os.close(descriptor)
        if cause.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise fail(
                "N0310", f"the file system has no locks: {(cause.strerror or str(cause)).lower()}", place=str(path),
                help="put `run_dir` on a local file system, or on one that is mounted with locks",
            ) from cause  # fmt: skip
        before = read_owner(run)
        raise fail(
            "N0311", f"the run is owned by another process: {before or 'one that has just started'}", place=str(run),
            help="wait for it, stop it, or give this one another `run_dir` in [output]",
        ) from None  # fmt: skip
    return descriptor
