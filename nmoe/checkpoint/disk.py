"""Files that are there whole or not at all, and reads that trust nothing.

A durable file is made in four steps: write a temporary file on the same file system, fsync it,
rename it over its name, fsync the directory. A crash of the process or of the machine at any
point leaves the old file or the new one. Every function here that fails says which file, and why.

Reading is the mirror of it: regular files only, no links, sizes capped before a byte is read.
"""

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nmoe.errors import RunError, fail

CHUNK = 1 << 20


class Damage(Exception):
    """Stored data that cannot be what was stored: one fault, said in the words of the file that has it."""


def cannot(action: str, path: Path, cause: OSError) -> RunError:
    """The failure of one system call on one file, with the way out for the causes that have one."""
    fewer = ", or lower `keep_checkpoints` in [output]" if "checkpoints" in path.parts else ""
    in_the_way = "a file stands where a directory has to be: move it away, or name another directory"
    ways_out = {
        errno.EEXIST: in_the_way,
        errno.ENOTDIR: in_the_way,
        errno.ENAMETOOLONG: "name a directory with a shorter path",
        errno.EISDIR: "a directory stands where a file has to be: move it away",
        errno.ENOSPC: f"free space on the file system of {path.parent}" + fewer,
        errno.EDQUOT: f"the quota on the file system of {path.parent} is used up: free space, or move `run_dir`",
        errno.EROFS: "the file system is mounted read-only: move `run_dir`, or mount it writable",
        errno.EACCES: f"give this user the right to write in {path.parent}",
        errno.EPERM: f"give this user the right to write in {path.parent}",
        errno.EIO: "the disk reports an error of its own: look at the system's log before trusting it again",
    }
    reason = cause.strerror or str(cause)
    name = errno.errorcode.get(cause.errno or 0, "")
    text = f"cannot {action} `{path.name}`: {reason.lower()}" + (f" ({name})" if name else "")
    return fail("N0301", text, place=str(path), help=ways_out.get(cause.errno or 0, ""))


@contextmanager
def naming(action: str, path: Path) -> Iterator[None]:
    """Turns an OSError inside the block into a RunError that names `action`, the file and the cause."""
    try:
        yield
    except OSError as cause:
        raise cannot(action, path, cause) from cause


def make_directory(path: Path) -> None:
    """Makes `path` and what is missing above it, each entry durable in its parent.

    One that is there may be the work of a process that was killed before its entry was durable, so the parent is
    synced all the same; but not where this user could not have made it, as above a mounted file system.
    """
    if path.is_dir():
        if os.access(path.parent, os.R_OK | os.W_OK | os.X_OK):
            sync_directory(path.parent)
        return
    if path.parent != path:
        make_directory(path.parent)
    with naming("make directory", path):
        try:
            path.mkdir()
        except FileExistsError:
            if not path.is_dir():
                raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Makes the entries of a directory durable: names that were added, renamed or removed."""
    with naming("sync directory", path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Writes every byte, however few the system takes at a time, and fsyncs."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    os.fsync(descriptor)


def write_synced(path: Path, data: bytes | memoryview) -> None:
    """Writes a new file and fsyncs its content. Its name is durable only after sync_directory."""
    with naming("write", path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            write_all(descriptor, data)
        finally:
            os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Puts `source` in the place of `target`, atomically. Durable only after sync_directory."""
    with naming("rename a temporary file to", target):
        source.rename(target)


def replace(path: Path, data: bytes) -> None:
    """Makes `path` hold `data`, durably: after a crash it holds what it held before, or all of `data`."""
    temporary = path.with_name(f"{path.name}.tmp")
    write_synced(temporary, data)
    rename(temporary, path)
    sync_directory(path.parent)


def remove(path: Path) -> None:
    with naming("remove", path):
        path.unlink()


def remove_tree(path: Path) -> None:
    """Removes a directory with all that is in it; a link in it is removed, not followed."""
    with naming("remove directory", path):
        shutil.rmtree(path)


@contextmanager
def opened(path: Path) -> Iterator[tuple[int, int]]:
    """(descriptor, size) of a regular file; a link, a directory or a missing file is Damage."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise Damage("is missing") from None
    except OSError as cause:
        raise Damage(f"cannot be opened: {(cause.strerror or str(cause)).lower()}") from cause
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Damage("is not a regular file")
        yield descriptor, status.st_size
    finally:
        os.close(descriptor)


def read(path: Path, *, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes; Damage if it is not one."""
    with opened(path) as (descriptor, size):
        if size > limit:
            raise Damage(f"has {size} bytes, more than the {limit} that such a file may have")
        content = bytearray(size)
        read_exactly(descriptor, memoryview(content))
        return bytes(content)


def read_exactly(descriptor: int, buffer: memoryview) -> None:
    """Fills `buffer` from the descriptor; Damage where the file ends early or cannot be read."""
    rest = buffer
    while rest:
        try:
            count = os.readv(descriptor, [rest])
        except OSError as cause:
            raise Damage(f"cannot be read: {(cause.strerror or str(cause)).lower()}") from cause
        if not count:
            raise Damage(f"ends {len(rest)} bytes early")
        rest = rest[count:]
