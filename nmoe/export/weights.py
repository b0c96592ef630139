"""Safetensors files in the stock layout: one, or several with an index where one would be large.

    model.safetensors                                        up to SHARD_BYTES of tensors
    model-00001-of-00003.safetensors, ...                    more
    model.safetensors.index.json                             {"metadata": {"total_size"}, "weight_map": {tensor: file}}

Tensors lie in the order of the model, a file is begun when the next tensor would not fit, and a
tensor is never cut.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import attrs
import torch
from safetensors.torch import save
from torch import Tensor

from nmoe.checkpoint import disk

SHARD_BYTES = 5 * 10**9


@attrs.frozen
class Piece:
    """A stock tensor: a view of one of ours, and the dtype in which it is stored."""

    name: str
    tensor: Tensor
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.tensor.shape) * self.dtype.itemsize


def shards(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """The pieces of each file."""
    files: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if files[-1] and size + piece.num_bytes > SHARD_BYTES:
            files.append([])
            size = 0
        files[-1].append(piece)
        size += piece.num_bytes
    return files


def write(directory: Path, pieces: Iterable[Piece], say: Callable[[str], None]) -> None:
    """Writes every piece, rounded to its dtype, and the index if there are several files; durable but for the names.

    RunError N0301 names the file and the system's reason.
    """
    files = shards(pieces)
    names = ["model.safetensors"]
    if len(files) > 1:
        names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    for name, members in zip(names, files, strict=True):
        say(f"writing {name}: {len(members)} tensors, {sum(piece.num_bytes for piece in members) / 1e6:.1f} MB")
        # A clone: safetensors takes no two tensors that share memory, and views of one of ours do.
        content = {piece.name: piece.tensor.to(piece.dtype, copy=True).contiguous() for piece in members}
        disk.write_synced(directory / name, save(content, metadata={"format": "pt"}))
    if len(files) > 1:
        write_json(directory / "model.safetensors.index.json", _index(names, files))


def _index(names: list[str], files: list[list[Piece]]) -> dict[str, object]:
    weight_map = {piece.name: name for name, members in zip(names, files, strict=True) for piece in members}
    total = sum(piece.num_bytes for members in files for piece in members)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """A JSON file for people and programs."""
    disk.write_synced(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
