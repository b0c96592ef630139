"""A disk that keeps what fsync promised, and of all else what it likes: the states that a power cut may leave.

It is fed the calls of a process (`tests.torture.calls`) and knows each file and directory twice: as the running
system sees it, and as it is on the disk for certain, with the changes since. Content is certain by its file's fsync,
a name (come, moved or gone) by its directory's; a rename into another directory is a name that comes and one that
goes. A cut is one of KEPT, or drawn: any of the changes, in order, and any part of what was written.
"""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Union

from tests.torture.calls import Call

Tree = dict[str, Union["Tree", bytes]]

KEPT: dict[str, Callable[[object], bool]] = {
    "entries lost": lambda node: False,
    "entries kept": lambda node: True,
    "removals kept": lambda node: node is None,
}
"""Of the changes of names that no fsync has made certain, those that are on the disk; of contents there is nothing."""


class File:
    def __init__(self, content: bytes = b"") -> None:
        self.now = self.certain = content

    def sync(self) -> None:
        self.certain = self.now


class Directory:
    """changes: of names since the last sync, in order; None stands for a name that has gone."""

    def __init__(self) -> None:
        self.now: dict[str, File | Directory] = {}
        self.certain: dict[str, File | Directory] = {}
        self.changes: list[tuple[str, File | Directory | None]] = []

    def put(self, name: str, node: "File | Directory | None") -> None:
        if node is None:
            del self.now[name]
        else:
            self.now[name] = node
        self.changes.append((name, node))

    def sync(self) -> None:
        self.certain, self.changes = dict(self.now), []


class Disk:
    """tree: what it begins with, for certain."""

    def __init__(self, tree: Tree) -> None:
        self.root = _certain(tree)

    def apply(self, call: Call, result: int) -> None:
        """A call that has come to `result`; one that has failed has changed nothing."""
        if result < 0 or call.name in ("close", "flock"):
            return
        parent, name = self._parent(call.path)
        known = parent.now.get(name) if name else self.root
        if call.name == "open":
            if known is None:
                parent.put(name, File())
            elif call.flags & os.O_TRUNC:
                known.now = b""
        elif call.name == "write":
            start = len(known.now) if call.offset is None else call.offset
            before = known.now[:start].ljust(start, b"\0")
            known.now = before + call.data[:result] + known.now[start + result :]
        elif call.name == "ftruncate":
            known.now = known.now[: call.count].ljust(call.count, b"\0")
        elif call.name == "fsync":
            known.sync()
        elif call.name == "mkdir":
            parent.put(name, Directory())
        elif call.name == "rename":
            target, new = self._parent(call.target)
            parent.put(name, None)
            target.put(new, known)
        elif call.name in ("unlink", "rmdir"):
            parent.put(name, None)
        else:
            raise ValueError(f"a disk does not know the call {call.key}")

    def _parent(self, path: str) -> tuple[Directory, str]:
        *above, name = Path(path).parts or ("",)
        node = self.root
        for part in above:
            node = node.now[part]
        return node, name

    def seen(self) -> Tree:
        """What a process sees, which a kill leaves as it is."""
        return _tree(self.root, lambda node: node.now, lambda file: file.now)

    def cut(self, kept: str) -> Tree:
        """What is there after a cut of the power of a kind of KEPT."""
        return _tree(self.root, lambda node: _names(node, KEPT[kept]), lambda file: file.certain)

    def drawn(self, draw: random.Random) -> Tree:
        """What is there after a cut in which the disk had done some of what it was not told to."""
        likely = draw.choice((0.2, 0.5, 0.8))
        return _tree(
            self.root, lambda node: _names(node, lambda _: draw.random() < likely), lambda file: _some(file, draw)
        )


def _names(node: Directory, kept: Callable[[object], bool]) -> dict[str, File | Directory]:
    found = dict(node.certain)
    for name, change in node.changes:
        if not kept(change):
            continue
        if change is None:
            found.pop(name, None)
        else:
            found[name] = change
    return found


def _some(file: File, draw: random.Random) -> bytes:
    """Content of which all that is not certain may be missing, or an end of it, or that end is room without content."""
    if file.now == file.certain:
        return file.certain
    pairs = zip(file.now, file.certain, strict=False)
    same = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(file.now), len(file.certain)))
    part = file.now[: draw.randrange(same, len(file.now) + 1)]
    return draw.choice((file.certain, file.now, part, part.ljust(len(file.now), b"\0")))


def _tree(node: Directory, names: Callable, content: Callable) -> Tree:
    return {
        name: content(child) if isinstance(child, File) else _tree(child, names, content)
        for name, child in names(node).items()
    }


def _certain(tree: Tree) -> Directory:
    node = Directory()
    node.now = {name: File(child) if isinstance(child, bytes) else _certain(child) for name, child in tree.items()}
    node.sync()
    return node


def read(path: Path) -> Tree:
    """What lies below a directory."""
    return {entry.name: read(entry) if entry.is_dir() else entry.read_bytes() for entry in path.iterdir()}


def write(tree: Tree, path: Path) -> None:
    """Makes the directory `path` of it."""
    path.mkdir()
    for name, child in tree.items():
        if isinstance(child, bytes):
            (path / name).write_bytes(child)
        else:
            write(child, path / name)


def frozen(tree: Tree) -> tuple:
    """The same for the same trees."""
    return tuple(sorted((name, child if isinstance(child, bytes) else frozen(child)) for name, child in tree.items()))
