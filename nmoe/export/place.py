"""Where an export is made: DIR.partial beside DIR, which becomes DIR when it is whole."""

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

from nmoe.checkpoint import disk
from nmoe.errors import ConfigError, Diagnostic, fail

# Every file of an export.
OURS = re.compile(r"README\.md|(generation_|tokenizer_)?config\.json|tokenizer\.json|model[-.][-\w.]*safetensors[\w.]*")


def require_free(directory: Path) -> None:
    """ConfigError N0911 unless nothing or an empty directory is there."""
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists() or directory.is_symlink():
        message = f"`{directory}` is not empty" if directory.is_dir() else f"`{directory}` is not a directory"
        raise ConfigError(Diagnostic(code="N0911", message=message, help="name a new or empty directory with -o"))


@contextlib.contextmanager
def partial(directory: Path) -> Iterator[Path]:
    """DIR.partial, ours alone and empty; at the end of the block it becomes DIR, after a failure it goes.

    What a killed export has left there is removed, and nothing else: ConfigError N0911 if there is more. RunError
    N0913 while another export writes there.
    """
    target = directory.resolve()
    made = target.with_name(f"{target.name}.partial")
    disk.make_directory(made)
    descriptor = os.open(made, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as cause:
            if cause.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise disk.cannot("lock", made, cause) from cause
            raise fail("N0913", "another export writes there", place=str(made), help="wait for it") from None
        before = sorted(made.iterdir())
        foreign = [entry.name for entry in before if not OURS.fullmatch(entry.name) or not entry.is_file()]
        if foreign:
            message = f"`{made}`, where the export is made, holds `{foreign[0]}`, which is not of one"
            raise ConfigError(Diagnostic(code="N0911", message=message, help="move it away, or name another directory"))
        for entry in before:
            disk.remove(entry)
        try:
            yield made
            disk.sync_directory(made)
            disk.rename(made, target)
        except BaseException:
            disk.remove_tree(made)
            raise
        disk.sync_directory(target.parent)
    finally:
        os.close(descriptor)
