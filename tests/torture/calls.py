"""The system calls that can change files: their numbers, where their arguments are, what they go by.

As <asm/unistd.h> and the manual's section 2 have them; x86-64 and aarch64.
"""

import re

import attrs

SHAPES: dict[str, dict[str, int]] = {
    "open": {"path": 0, "flags": 1}, "creat": {"path": 0}, "openat": {"at": 0, "path": 1, "flags": 2},
    "write": {"fd": 0, "data": 1, "count": 2}, "pwrite64": {"fd": 0, "data": 1, "count": 2, "offset": 3},
    "writev": {"fd": 0}, "pwritev": {"fd": 0}, "pwritev2": {"fd": 0}, "copy_file_range": {"fd": 2},
    "sendfile": {"fd": 0}, "fsync": {"fd": 0}, "fdatasync": {"fd": 0}, "close": {"fd": 0}, "flock": {"fd": 0},
    "ftruncate": {"fd": 0, "count": 1}, "truncate": {"path": 0, "count": 1}, "fallocate": {"fd": 0},
    "rename": {"path": 0, "path2": 1}, "renameat": {"at": 0, "path": 1, "at2": 2, "path2": 3},
    "renameat2": {"at": 0, "path": 1, "at2": 2, "path2": 3}, "link": {"path": 0, "path2": 1},
    "linkat": {"at": 0, "path": 1, "at2": 2, "path2": 3}, "symlink": {"path": 1}, "symlinkat": {"at": 1, "path": 2},
    "mkdir": {"path": 0}, "mkdirat": {"at": 0, "path": 1}, "rmdir": {"path": 0}, "unlink": {"path": 0},
    "unlinkat": {"at": 0, "path": 1, "flags": 2},
}  # fmt: skip
"""Where the arguments of a call are: a descriptor, or a path and the descriptor of the directory that it begins at."""

NAMES = {
    "openat": "open", "creat": "open", "pwrite64": "write", "fdatasync": "fsync", "truncate": "ftruncate",
    "renameat": "rename", "renameat2": "rename", "linkat": "link", "symlinkat": "symlink", "mkdirat": "mkdir",
}  # fmt: skip
"""What calls that do the same go by."""


@attrs.frozen(kw_only=True)
class Machine:
    """How a kind of processor passes system calls, as its <asm/unistd.h> and its struct user_regs have them."""

    audit: int
    registers: int
    arguments: tuple[int, ...]
    result: int
    number: int | None
    """None: the number has a register set of its own."""
    numbers: dict[str, int]


MACHINES = {
    "x86_64": Machine(
        audit=0xC000003E, registers=27, arguments=(14, 13, 12, 7, 9, 8), result=10, number=15,
        numbers={
            "write": 1, "open": 2, "close": 3, "pwrite64": 18, "writev": 20, "sendfile": 40, "flock": 73, "fsync": 74,
            "fdatasync": 75, "truncate": 76, "ftruncate": 77, "rename": 82, "mkdir": 83, "rmdir": 84, "creat": 85,
            "link": 86, "unlink": 87, "symlink": 88, "openat": 257, "mkdirat": 258, "unlinkat": 263, "renameat": 264,
            "linkat": 265, "symlinkat": 266, "fallocate": 285, "pwritev": 296, "renameat2": 316,
            "copy_file_range": 326, "pwritev2": 328,
        },
    ),
    "aarch64": Machine(
        audit=0xC00000B7, registers=34, arguments=(0, 1, 2, 3, 4, 5), result=0, number=None,
        numbers={
            "flock": 32, "mkdirat": 34, "unlinkat": 35, "symlinkat": 36, "linkat": 37, "renameat": 38, "truncate": 45,
            "ftruncate": 46, "fallocate": 47, "openat": 56, "close": 57, "write": 64, "writev": 66, "pwrite64": 68,
            "pwritev": 70, "sendfile": 71, "fsync": 82, "fdatasync": 83, "renameat2": 276, "copy_file_range": 285,
            "pwritev2": 287,
        },
    ),
}  # fmt: skip

DRAWN = re.compile(r"\.[0-9a-f]{16}(\.\d+)?$|(?<=tmp/step_\d{8})\.\d+(?=$|/)")


@attrs.frozen(kw_only=True)
class Call:
    """A call of process `rank` that can change what is below the directory.

    name: the kernel's, or what it stands for in NAMES. path, target: relative to the directory, "." itself.
    data: what a write writes from `offset` on; a file that is only appended to has none.
    time: how many of its kind have come before.
    """

    rank: int
    name: str
    path: str
    target: str = ""
    flags: int = 0
    count: int = 0
    data: bytes = b""
    offset: int | None = None
    time: int = 0

    @property
    def kind(self) -> str:
        """Another run of the same training has it too: what a process draws, or deals to a thread, is left out."""
        paths = " -> ".join(DRAWN.sub(".*", path) for path in (self.path, self.target) if path)
        return f"rank {self.rank} {self.name} {paths}"

    @property
    def key(self) -> str:
        return f"{self.kind} {self.time}"
