"""The layout of a run's checkpoints on disk, and the slices that a tensor is stored in.

    RUN/checkpoints/
      HEAD                          {"manifest": SHA-256 of the file below | null, "step": N, "version": 1}
      step_XXXXXXXX/manifest.json   what that checkpoint is made of (nmoe.checkpoint.manifest)
      objects/ab/abcd...            the bytes of one slice, named by their SHA-256; no header
      tmp/                          files that are being written; nothing refers to them

An object is the little-endian bytes of a run of elements of one logical tensor in row-major order.
Where a tensor is cut depends on its name, shape and dtype alone, never on ranks, threads or what
was saved before, so the list of its slices' hashes stands for its content: two tensors are equal
exactly if their lists are. The rule:

    a tensor of experts (three axes or more, and axes in its name that begin with E, such as
    `w_gate_up_E2FD`) is cut at every expert; then each piece (of another tensor: the whole) is
    cut after every SLICE_BYTES, rounded down to whole rows of the last axis.

So a rank that owns experts owns objects, and no object is larger than SLICE_BYTES.
"""

import math
import re
from pathlib import Path

from nmoe.checkpoint.disk import Damage

VERSION = 1
SLICE_BYTES = 16 << 20
HEAD_LIMIT = 4096
MANIFEST_LIMIT = 1 << 28
ELEMENTS_LIMIT = 1 << 48
STEP_LIMIT = 10**12

DTYPE_BYTES = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1,
}  # fmt: skip

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


def is_cut_by_expert(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the tensor's first axis counts experts, as the axes in its name say."""
    axes = name.rsplit("/", 1)[-1].rsplit(".", 1)[-1].rpartition("_")[2]
    return len(shape) >= 3 and axes.startswith("E") and axes.upper() == axes


def boundaries(name: str, shape: tuple[int, ...], dtype: str) -> list[tuple[int, int]]:
    """Element ranges [start, stop) of the tensor's slices, in order; none for a tensor without elements."""
    count = math.prod(shape)
    if not count:
        return []
    piece, block = _piece_and_block(name, shape, dtype)
    return [
        (start, min(start + block, first + piece))
        for first in range(0, count, piece)
        for start in range(first, first + piece, block)
    ]


def slice_count(name: str, shape: tuple[int, ...], dtype: str) -> int:
    """How many slices boundaries() gives, without making them: a manifest's claim is checked before it is believed."""
    count = math.prod(shape)
    if not count:
        return 0
    piece, block = _piece_and_block(name, shape, dtype)
    return count // piece * -(-piece // block)


def _piece_and_block(name: str, shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
    """Elements between the cuts that must be, and elements of the blocks inside such a piece."""
    count = math.prod(shape)
    block = SLICE_BYTES // DTYPE_BYTES[dtype]
    row = shape[-1] if len(shape) >= 2 else 1
    block -= block % row if row <= block else 0
    return (count // shape[0] if is_cut_by_expert(name, shape) else count), block


def check_tensor(name: str, shape: tuple[int, ...], dtype: str) -> None:
    """Damage if no tensor of that name, shape and dtype can be stored."""
    if not TENSOR_NAME.fullmatch(name) or ".." in name:
        raise Damage(f"names a tensor {name[:80]!r}, which is no logical name")
    if dtype not in DTYPE_BYTES:
        raise Damage(f"gives tensor `{name}` dtype {dtype[:80]!r}, which is none that is stored")
    if len(shape) > 16 or any(size > ELEMENTS_LIMIT for size in shape) or math.prod(shape) > ELEMENTS_LIMIT:
        raise Damage(f"gives tensor `{name}` an absurd shape")
