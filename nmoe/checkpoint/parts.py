"""What each rank holds of the logical tensors, and whether that is all of them together.

A rank's part of a tensor (nmoe.part) is a run of whole slices (nmoe.slices). A save takes every slice of
every tensor from exactly one rank; a read gives every slice to at least one.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import attrs

from nmoe.checkpoint import format as layout
from nmoe.checkpoint.manifest import TensorRecord
from nmoe.errors import fail
from nmoe.part import Part
from nmoe.slices import slice_at, slice_count

if TYPE_CHECKING:
    from torch import Tensor

NOTES = 12


@attrs.frozen
class Span:
    """Slices [first, last) of a logical tensor, which one rank holds. hashes: their SHA-256, once they are stored."""

    dtype: str
    shape: tuple[int, ...]
    first: int
    last: int
    hashes: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, part: Part) -> "Span":
        """Damage if no such tensor can be stored, ValueError if the part does not begin and end where slices do."""
        dtype = dtype_name(part.tensor)
        layout.check_tensor(name, part.shape, dtype)
        first = slice_at(name, part.shape, dtype, part.start)
        return cls(dtype, part.shape, first, slice_at(name, part.shape, dtype, part.start + part.tensor.numel()))

    @classmethod
    def parse(cls, fields: Sequence[object]) -> "Span":
        """What `attrs.astuple` made, after JSON."""
        dtype, shape, first, last, hashes = fields
        return cls(dtype, tuple(shape), first, last, tuple(hashes))  # type: ignore[arg-type]


Spans = Mapping[str, Span]


def join(ranks: Sequence[Spans], *, step: int) -> dict[str, TensorRecord]:
    """The records of all tensors, from what each rank has stored of them.

    RunError N0320 names each slice that no rank has given, or more than one, and each tensor of which ranks
    say different dtypes or shapes.
    """
    records: dict[str, TensorRecord] = {}
    findings: list[str] = []
    for name, held in _by_name(ranks).items():
        span = held[0][1]
        findings += _unlike(name, held)
        findings += [*_gaps(name, span, held), *_overlaps(name, held)]
        hashes = tuple(sha256 for _, one in _in_order(held) for sha256 in one.hashes)
        records[name] = TensorRecord(dtype=span.dtype, shape=span.shape, slices=hashes)
    if findings:
        raise fail(
            "N0320",
            f"the ranks do not give every tensor of step {step} exactly once: {findings[0]}"
            + (f", and {len(findings) - 1} more" if findings[1:] else ""),
            place="the state that was to be saved",
            help="it has not been saved, HEAD stands as it was: all ranks must run the same plan on the same code",
            notes=findings[1:NOTES],
        )
    return records


def differences(saved: Mapping[str, TensorRecord], ranks: Sequence[Spans]) -> list[str]:
    """What is not as saved: names, dtypes and shapes that differ, and slices that no rank holds."""
    held = _by_name(ranks)
    findings = [f"`{name}` is in the checkpoint and not in this program" for name in saved.keys() - held.keys()]
    findings += [f"`{name}` is in this program and not in the checkpoint" for name in held.keys() - saved.keys()]
    for name in saved.keys() & held.keys():
        record = saved[name]
        there = (record.dtype, record.shape)
        unlike = {kind: rank for rank, span in reversed(held[name]) if (kind := (span.dtype, span.shape)) != there}
        for kind, rank in unlike.items():
            kinds = [f"{dtype} {list(shape)}" for dtype, shape in (there, kind)]
            where = "here" if len(ranks) == 1 else f"on rank {rank}"
            findings.append(f"`{name}` is {kinds[0]} in the checkpoint, {kinds[1]} {where}")
        if not unlike:
            findings += _gaps(name, held[name][0][1], held[name])
    return sorted(findings)


def dtype_name(tensor: "Tensor") -> str:
    """The name under which a manifest records the tensor's dtype, such as "bfloat16"."""
    return str(tensor.dtype).removeprefix("torch.")


def _by_name(ranks: Sequence[Spans]) -> dict[str, list[tuple[int, Span]]]:
    """(rank, span) of each tensor, lowest rank first."""
    found: dict[str, list[tuple[int, Span]]] = {}
    for rank, spans in enumerate(ranks):
        for name, span in spans.items():
            found.setdefault(name, []).append((rank, span))
    return found


def _in_order(held: Iterable[tuple[int, Span]]) -> list[tuple[int, Span]]:
    return sorted(held, key=lambda item: (item[1].first, item[1].last, item[0]))


def _unlike(name: str, held: Sequence[tuple[int, Span]]) -> list[str]:
    first_rank, first = held[0]
    return [
        f"`{name}` is {first.dtype} {list(first.shape)} on rank {first_rank}, {span.dtype} {list(span.shape)} on {rank}"
        for rank, span in held[1:]
        if (span.dtype, span.shape) != (first.dtype, first.shape)
    ]


def _gaps(name: str, like: Span, held: Sequence[tuple[int, Span]]) -> list[str]:
    """Slices that nobody holds."""
    findings, end, total = [], 0, slice_count(name, like.shape, like.dtype)
    for first, last in [*((span.first, span.last) for _, span in _in_order(held)), (total, total)]:
        if first > end:
            findings.append(f"{_slices(end, first)} of {total} of `{name}` {_are(end, first)} held by no rank")
        end = max(end, last)
    return findings


def _overlaps(name: str, held: Sequence[tuple[int, Span]]) -> list[str]:
    """Slices that two hold."""
    findings: list[str] = []
    before: tuple[int, Span] | None = None
    for rank, span in _in_order(held):
        if before is not None and span.first < min(before[1].last, span.last):
            both = span.first, min(before[1].last, span.last)
            findings.append(f"{_slices(*both)} of `{name}` {_are(*both)} given by ranks {before[0]} and {rank}")
        if before is None or span.last > before[1].last:
            before = rank, span
    return findings


def _slices(first: int, last: int) -> str:
    return f"slice {first}" if last - first == 1 else f"slices {first} to {last - 1}"


def _are(first: int, last: int) -> str:
    return "is" if last - first == 1 else "are"
