"""Where two saved tensors differ: the slices by their hashes, and the elements of the first slice that does."""

import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from nmoe.checkpoint import disk
from nmoe.checkpoint import format as layout
from nmoe.checkpoint.disk import Damage
from nmoe.checkpoint.manifest import TensorRecord
from nmoe.slices import DTYPE_BYTES, SLICE_BYTES, boundaries, is_cut_by_expert

if TYPE_CHECKING:
    import numpy as np


@attrs.frozen(kw_only=True)
class Told:
    """a, b: the values of the first element that differs, or what else each has."""

    where: str
    a: float | int | str | None
    b: float | int | str | None


def by_cause(names: Iterable[str]) -> list[str]:
    """Tensors of a state in the order in which a step makes them.

    Parameters from the model's first to its last, of each its moments before the master that they move; then the
    routers' biases, layer after layer.
    """

    def key(name: str) -> tuple[bool, float, str, bool, str]:
        kind, _, parameter = name.partition("/")
        first, _, rest = parameter.partition(".")
        number = rest.partition(".")[0]
        place = int(number) if first == "layers" and number.isdigit() else -1 if first == "embedding" else math.inf
        return kind == "router.bias", place, parameter, kind == "master", kind

    return sorted(names, key=key)


def difference(
    name: str, a: TensorRecord | None, b: TensorRecord | None, checkpoints: tuple[Path, Path] | None
) -> Told:
    """What differs between two records that are not equal. checkpoints: a's and b's; None: their bytes are not read."""
    if a is None or b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
        kinds = [None if one is None else f"{one.dtype} {list(one.shape)}" for one in (a, b)]
        return Told(where="", a=kinds[0], b=kinds[1])
    differing = [index for index, pair in enumerate(zip(a.slices, b.slices, strict=True)) if pair[0] != pair[1]]
    start, stop = boundaries(name, a.shape, a.dtype)[differing[0]]
    where = f"{len(differing)} of {len(a.slices)} slices"
    if is_cut_by_expert(name, a.shape):
        where += f", first expert {start // math.prod(a.shape[1:])}"
    elif len(a.slices) > 1:
        where += f", first slice {differing[0]}"
    hashes = a.slices[differing[0]], b.slices[differing[0]]
    if checkpoints is None:
        return Told(where=where, a=hashes[0][:16], b=hashes[1][:16])
    size = (stop - start) * DTYPE_BYTES[a.dtype]
    try:
        left, right = (_object(directory, sha256, size) for directory, sha256 in zip(checkpoints, hashes, strict=True))
    except Damage as damage:
        return Told(where=f"{where}; {damage}", a=hashes[0][:16], b=hashes[1][:16])
    return _elements(a, start, where, left, right)


def _object(directory: Path, sha256: str, size: int) -> bytes:
    """The bytes of a slice; Damage unless they are what its name says."""
    content = disk.read(layout.object_path(directory, sha256), limit=SLICE_BYTES)
    if len(content) != size or hashlib.sha256(content).hexdigest() != sha256:
        raise Damage(f"object {sha256[:16]}... is damaged")
    return content


def _elements(record: TensorRecord, start: int, where: str, a: bytes, b: bytes) -> Told:
    import numpy as np

    width = DTYPE_BYTES[record.dtype]
    bits = [np.frombuffer(content, dtype=f"<u{width}") for content in (a, b)]
    (unlike,) = np.nonzero(bits[0] != bits[1])
    first = int(unlike[0])
    index = [int(place) for place in np.unravel_index(start + first, record.shape)] if record.shape else []
    left, right = (_value(one[first : first + 1], record.dtype) for one in bits)
    return Told(where=f"{where}: {len(unlike)} of its {len(bits[0])} elements, first {index}", a=left, b=right)


def _value(bits: "np.ndarray", dtype: str) -> float | int | str:
    """One element; of a dtype that numpy does not have, its bits."""
    import numpy as np

    if dtype == "bfloat16":
        return float((bits.astype(np.uint32) << 16).view(np.float32)[0])
    if dtype.startswith("float8"):
        return f"0x{int(bits[0]):02x}"
    value = bits.view(dtype)[0]
    return float(value) if dtype.startswith("float") else int(value)
