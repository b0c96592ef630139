"""Where a logical tensor may be cut: into the slices that a checkpoint stores, which ranks hold whole.

Where a tensor is cut depends on its name, shape and dtype alone, never on ranks, threads or what was
saved before. The rule:

    a tensor of experts (three axes or more, and axes in its name that begin with E, such as
    `w_gate_up_E2FD`) is cut at every expert; then each piece (of another tensor: the whole) is
    cut after every SLICE_BYTES, rounded down to whole rows of the last axis.

So a rank that owns experts owns slices, and no slice is larger than SLICE_BYTES.
"""

import math

SLICE_BYTES = 16 << 20

DTYPE_BYTES = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1,
}  # fmt: skip


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
    return slice_at(name, shape, dtype, math.prod(shape))


def slice_at(name: str, shape: tuple[int, ...], dtype: str, element: int) -> int:
    """How many slices lie before `element`, which has to be where one begins, or the end; ValueError elsewhere."""
    count = math.prod(shape)
    if not count and not element:
        return 0
    piece, block = _piece_and_block(name, shape, dtype) if count else (1, 1)
    within = element % piece
    if not 0 <= element <= count or within % block:
        raise ValueError(f"`{name}` of shape {list(shape)} is not cut at element {element}")
    return element // piece * -(-piece // block) + within // block


def _piece_and_block(name: str, shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
    """Elements between the cuts that must be, and elements of the blocks inside such a piece."""
    count = math.prod(shape)
    block = SLICE_BYTES // DTYPE_BYTES[dtype]
    row = shape[-1] if len(shape) >= 2 else 1
    block -= block % row if row <= block else 0
    return (count // shape[0] if is_cut_by_expert(name, shape) else count), block
