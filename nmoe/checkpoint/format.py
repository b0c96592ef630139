"""The layout of a run's checkpoints on disk.

    RUN/checkpoints/
      HEAD                          {"manifest": SHA-256 of the file below | null, "step": N, "version": 1}
      step_XXXXXXXX/manifest.json   what that checkpoint is made of (nmoe.checkpoint.manifest)
      objects/ab/abcd...            the bytes of one slice, named by their SHA-256; no header
      tmp/                          files that are being written; nothing refers to them

An object is the little-endian bytes of one slice of a logical tensor (nmoe.slices), elements in row-major
order. Where a tensor is cut depends on its name, shape and dtype alone, so the list of its slices'
hashes stands for its content: two tensors are equal exactly if their lists are.
"""

import math
import re
from pathlib import Path

from nmoe.checkpoint.disk import Damage
from nmoe.slices import DTYPE_BYTES

VERSION = 1
HEAD_LIMIT = 4096
MANIFEST_LIMIT = 1 << 28
ELEMENTS_LIMIT = 1 << 48
STEP_LIMIT = 10**12

DIGEST = re.compile(r"[0-9a-f]{64}")
TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./\-]{0,511}")
STEP_DIRECTORY = re.compile(r"step_([0-9]{8,13})")


def head_path(directory: Path) -> Path:
    return directory / "HEAD"


def temporary_directory(directory: Path) -> Path:
    return directory / "tmp"


def objects_directory(directory: Path) -> Path:
    return directory / "objects"


def object_path(directory: Path, sha256: str) -> Path:
    """Where the object of that digest lies. The digest must have been checked: it becomes a path."""
    if not DIGEST.fullmatch(sha256):
        raise ValueError(f"not a SHA-256: {sha256!r}")
    return directory / "objects" / sha256[:2] / sha256


def step_directory(directory: Path, step: int) -> Path:
    return directory / f"step_{step:08d}"


def manifest_path(directory: Path, step: int) -> Path:
    return step_directory(directory, step) / "manifest.json"


def steps_on_disk(directory: Path) -> list[int]:
    """Steps that have a directory, ascending, whatever is in it."""
    if not directory.is_dir():
        return []
    found = []
    for entry in directory.iterdir():
        match = STEP_DIRECTORY.fullmatch(entry.name)
        if match and step_directory(directory, int(match[1])).name == entry.name:
            found.append(int(match[1]))
    return sorted(found)


def check_tensor(name: str, shape: tuple[int, ...], dtype: str) -> None:
    """Damage if no tensor of that name, shape and dtype can be stored."""
    if not TENSOR_NAME.fullmatch(name) or ".." in name:
        raise Damage(f"names a tensor {name[:80]!r}, which is no logical name")
    if dtype not in DTYPE_BYTES:
        raise Damage(f"gives tensor `{name}` dtype {dtype[:80]!r}, which is none that is stored")
    if len(shape) > 16 or any(size > ELEMENTS_LIMIT for size in shape) or math.prod(shape) > ELEMENTS_LIMIT:
        raise Damage(f"gives tensor `{name}` an absurd shape")
