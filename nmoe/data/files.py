"""Small files of data that are read whole: regular ones, and no more of them than a limit."""

import errno
from pathlib import Path


def read(path: Path, *, limit: int) -> bytes:
    """The first limit + 1 bytes at most, so that the caller sees whether there are more. OSError as it comes.

    A pipe could be waited for without end, so what is there and is no regular file is not opened.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with path.open("rb") as file:
        return file.read(limit + 1)
