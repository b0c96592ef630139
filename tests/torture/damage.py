"""What can befall a file: bits, bytes, pages, its end, its name. And what can befall a run's directory as a whole."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

PAGE = 4096

Draw = random.Random


def put(path: Path, content: bytes) -> None:
    """A new file in the place of what is there, which may have other names."""
    gone(path)
    path.write_bytes(content)


def gone(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def restore(source: Path, target: Path) -> None:
    """Makes a directory what another one is, and does nothing where it is that already.

    What no program changes in place is there under two names.
    """
    if target.is_symlink() or not target.is_dir():
        gone(target)
        target.mkdir()
    wanted, there = ({entry.name: entry for entry in os.scandir(one)} for one in (source, target))
    for name in there.keys() - wanted.keys():
        gone(target / name)
    for name, entry in wanted.items():
        own, path = there.get(name), target / name
        if entry.is_dir(follow_symlinks=False):
            restore(source / name, path)
        elif own is None or not _same(entry, own):
            gone(path)
            if entry.is_symlink():
                path.symlink_to(Path(entry.path).readlink())
            elif entry.is_file() and ("/objects/" in entry.path or name.endswith(".parquet")):
                path.hardlink_to(entry.path)
            elif entry.is_file():
                shutil.copyfile(entry.path, path)
            else:
                os.mkfifo(path)


def _same(one: os.DirEntry, other: os.DirEntry) -> bool:
    if one.inode() == other.inode():
        return True
    plain = all(entry.is_file(follow_symlinks=False) for entry in (one, other))
    return plain and Path(one.path).read_bytes() == Path(other.path).read_bytes()


def _flip(draw: Draw, path: Path) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    put(path, bytes(content))


def _truncate(draw: Draw, path: Path) -> None:
    content = path.read_bytes()
    put(path, content[: draw.randrange(max(len(content), 1))])


def _append(draw: Draw, path: Path) -> None:
    put(path, path.read_bytes() + draw.randbytes(draw.choice((1, 1, draw.randrange(1, PAGE), PAGE))))


def _zero_a_page(draw: Draw, path: Path) -> None:
    content = bytearray(path.read_bytes())
    page = draw.randrange(-(-len(content) // PAGE)) if content else 0
    part = slice(page * PAGE, min((page + 1) * PAGE, len(content)))
    content[part] = bytes(part.stop - part.start)
    put(path, bytes(content))


def _other_bytes(draw: Draw, path: Path) -> None:
    put(path, draw.randbytes(path.stat().st_size))


def _lose(draw: Draw, path: Path) -> None:
    path.unlink()


def _directory(draw: Draw, path: Path) -> None:
    path.unlink()
    path.mkdir()
    if draw.random() < 0.5:
        (path / "note").write_text("somebody's")


def _link_to_the_same(draw: Draw, path: Path) -> None:
    copy = path.parents[1] / f"copy of {path.name}"
    shutil.copyfile(path, copy)
    path.unlink()
    path.symlink_to(copy)


def _link_to_nothing(draw: Draw, path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


def _pipe(draw: Draw, path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


LINKED, LOST = "a link to the same", "missing"
WAYS: dict[str, tuple[int, Callable[[Draw, Path], None]]] = {
    "bit flipped": (60, _flip),
    "truncated": (12, _truncate),
    "bytes appended": (7, _append),
    "page zeroed": (6, _zero_a_page),
    "other bytes": (4, _other_bytes),
    LOST: (4, _lose),
    "emptied": (2, lambda draw, path: put(path, b"")),
    "a directory": (1, _directory),
    LINKED: (1, _link_to_the_same),
    "a link to nothing": (1, _link_to_nothing),
    "a pipe": (1, _pipe),
}
"""name: (weight, what is done to the file)"""


def befall(draw: Draw, path: Path, *, but: tuple[str, ...] = ()) -> str:
    """One of WAYS, drawn, befalls a file, and it is then not what it was; which one."""
    names = [name for name in WAYS if name not in but]
    before = path.read_bytes()
    while True:
        name = draw.choices(names, [WAYS[name][0] for name in names])[0]
        WAYS[name][1](draw, path)
        if path.is_symlink() or not path.is_file() or path.read_bytes() != before:
            return name
        put(path, before)
