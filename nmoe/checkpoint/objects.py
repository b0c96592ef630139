"""Slices into content-addressed files, and the removal of files that no kept checkpoint needs."""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import attrs
import torch

from nmoe.checkpoint import disk
from nmoe.checkpoint import format as layout
from nmoe.checkpoint.disk import Damage
from nmoe.checkpoint.manifest import Manifest
from nmoe.checkpoint.parts import Span
from nmoe.checkpoint.verify import nothing, read_head, read_manifest
from nmoe.errors import fail
from nmoe.part import Part
from nmoe.slices import boundaries

T = TypeVar("T")
Address = Callable[[memoryview], str]

INFINITY = {
    torch.float64: 0x7FF0 << 48, torch.float32: 0x7F80 << 16, torch.bfloat16: 0x7F80, torch.float16: 0x7C00,
    torch.float8_e4m3fn: 0x7F,
}  # fmt: skip
"""The bits of the first positive value that is not finite; in the last it is the only one, NaN."""


@attrs.frozen(kw_only=True)
class Stored:
    """spans: what has been stored of every tensor, by name. objects, bytes: of those that were not there before."""

    spans: dict[str, Span]
    objects: int
    bytes: int


@attrs.frozen(kw_only=True)
class Removed:
    """A checkpoint that was taken away, and why."""

    step: int
    reason: str


def sha256(content: memoryview) -> str:
    return hashlib.sha256(content).hexdigest()


def store(
    directory: Path,
    parts: Mapping[str, Part],
    *,
    threads: int,
    owner: str = "0",
    alive: Callable[[], None] = nothing,
    address: Address = sha256,
) -> Stored:
    """Stores the slices of parts, contiguous on the CPU; when it returns, each object and its name is durable.

    owner: in the names of temporary files; no two that may be at work in the directory have the same. alive: called
    as the work goes on. address: of a slice's bytes; another than SHA-256 only to measure what that costs.

    threads: that write. Half as many hash the same slices meanwhile: a file needs its name only when it is renamed, so
    the disk waits for no hash, and with fewer threads on the cores the writers get theirs sooner. A thread writes and
    syncs a slice in one go: small files then share the journal's commits. An object that is there already, whole or
    damaged, is replaced by the bytes that its name stands for, so nobody has to read it.
    RunError N0301 if a file cannot be written, N0317 if a value is not finite (an update can overflow after the last
    look at the gradients); what has been written by then is no part of any checkpoint.
    """
    temporary = layout.temporary_directory(directory)

    def hashed(name: str, start: int, values: torch.Tensor) -> str:
        require_finite(name, start, values)
        return address(_bytes(values))

    def put(number: int, values: torch.Tensor) -> Path:
        path = temporary / f"object.{owner}.{number}"
        disk.write_synced(path, _bytes(values))
        return path

    def name_it(written: Path, path: Path) -> bool:
        """Whether no such object was there."""
        with disk.naming("make directory", path.parent):
            path.parent.mkdir(exist_ok=True)
        is_new = not path.exists()
        disk.rename(written, path)
        return is_new

    hashers = ThreadPoolExecutor(max(1, threads // 2), thread_name_prefix="hash")
    writers = ThreadPoolExecutor(threads, thread_name_prefix="object")
    try:
        numbers = itertools.count()
        spans: dict[str, Span] = {}
        pending: dict[str, list[tuple[Future[str], Future[Path], int]]] = {}
        for name, part in parts.items():
            flat = part.tensor.reshape(-1)
            spans[name] = span = Span.of(name, part)
            pending[name] = []
            for start, stop in boundaries(name, part.shape, span.dtype)[span.first : span.last]:
                values = flat[start - part.start : stop - part.start]
                futures = hashers.submit(hashed, name, start, values), writers.submit(put, next(numbers), values)
                pending[name].append((*futures, values.numel() * values.element_size()))
        sizes: dict[Path, int] = {}
        renamed: list[Future[bool]] = []
        for name, slices in pending.items():
            hashes = []
            for digest, written, size in slices:
                hashes.append(digest.result())
                path = layout.object_path(directory, hashes[-1])
                if path in sizes:
                    disk.remove(written.result())
                else:
                    sizes[path] = size
                    renamed.append(writers.submit(name_it, written.result(), path))
                alive()
            spans[name] = attrs.evolve(spans[name], hashes=tuple(hashes))
        new = [size for size, is_new in zip(sizes.values(), _each(renamed, alive), strict=True) if is_new]
        synced = [writers.submit(disk.sync_directory, folder) for folder in sorted({path.parent for path in sizes})]
        list(_each(synced, alive))
        disk.sync_directory(layout.objects_directory(directory))
    finally:
        for pool in (hashers, writers):
            pool.shutdown(cancel_futures=True)
    return Stored(spans=spans, objects=len(new), bytes=sum(new))


def _bytes(values: torch.Tensor) -> memoryview:
    return values.view(torch.uint8).numpy().data


def _each(futures: Iterable[Future[T]], alive: Callable[[], None]) -> Iterator[T]:
    """Their results in order, with a sign of work after each."""
    for future in futures:
        yield future.result()
        alive()


def require_finite(name: str, start: int, values: torch.Tensor) -> None:
    """RunError N0317 if one of a tensor's elements from `start` on is not finite.

    Read as signed integers the positive elements come in order, as unsigned ones the negative: the finite, the
    infinite, NaN; so the two largest say it. That takes a third of what torch.aminmax takes of a core, and no team of
    threads for each thread that saves, which would compete with the training's.
    """
    infinity = INFINITY.get(values.dtype)
    if infinity is None:
        return
    size = values.element_size()
    content = values.view(torch.uint8).numpy()
    signed, unsigned, sign = content.view(f"i{size}"), content.view(f"u{size}"), 1 << (8 * size - 1)
    if signed.max() < infinity and unsigned.max() < sign + infinity:
        return
    place = int(((unsigned & (sign - 1)) >= infinity).argmax())
    raise fail(
        "N0317",
        f"`{name}` is not finite: {float(values[place])} at element {start + place}",
        place="the state that was to be saved",
        help="it has not been saved, HEAD stands as it was: lower the rate, or look at the steps since then",
    )


def retain(
    directory: Path, head: Manifest | None, *, keep: int, alive: Callable[[], None] = nothing
) -> tuple[Removed, ...]:
    """Removes all but `head` and the newest intact checkpoints before it, `keep` in all.

    Intact: the manifest is whole and every object is there at its size. HEAD must name `head`
    durably before this is called. Manifests go first, durably, so that none ever lacks its objects.
    alive: called as the work goes on.
    """
    kept, removed = _sort(directory, head, keep)
    for one in removed:
        # One rename, so that nobody ever sees a checkpoint that is half gone.
        gone = layout.temporary_directory(directory) / f"step_{one.step:08d}.{os.getpid()}"
        disk.rename(layout.step_directory(directory, one.step), gone)
        disk.sync_directory(directory)
        disk.remove_tree(gone)
        alive()
    for entry in _unneeded(directory, kept):
        disk.remove(entry)
        alive()
    return tuple(removed)


def left_over(directory: Path, *, keep: int) -> bool:
    """Whether there is what belongs to no kept checkpoint, as a save leaves it that was cut short after HEAD moved.

    True too where HEAD's manifest cannot be read: who goes on to open it says why.
    """
    try:
        head = read_head(directory)
        manifest = None if head is None or head.manifest is None else read_manifest(directory, head.step)[0]
    except Damage:
        return True
    kept, removed = _sort(directory, manifest, keep)
    return bool(removed or _unneeded(directory, kept) or list(layout.temporary_directory(directory).glob("*")))


def _sort(directory: Path, head: Manifest | None, keep: int) -> tuple[list[Manifest], list[Removed]]:
    """The checkpoints that stay, and those that go with the reason."""
    kept = [] if head is None else [head]
    removed: list[Removed] = []
    for step in reversed(layout.steps_on_disk(directory)):
        if head is not None and step == head.step:
            continue
        if head is None or step > head.step:
            reason = "ahead of HEAD: an unfinished save, or left behind by a rewind"
        elif len(kept) == keep:
            reason = f"older than the newest {keep}"
        else:
            try:
                kept.append(_intact(directory, step))
                continue
            except Damage as damage:
                reason = f"not intact: {damage}"
        removed.append(Removed(step=step, reason=reason))
    return kept, removed


def _unneeded(directory: Path, kept: Iterable[Manifest]) -> list[Path]:
    """Objects that none of `kept` needs."""
    needed = {sha256 for manifest in kept for sha256 in manifest.objects}
    found = layout.objects_directory(directory).glob("*/*")
    return [entry for entry in found if entry.name not in needed and layout.DIGEST.fullmatch(entry.name)]


def require_objects(directory: Path, manifest: Manifest) -> None:
    """Damage unless every object of `manifest` is there at its size."""
    for sha256, size in manifest.objects.items():
        with disk.opened(layout.object_path(directory, sha256)) as (_, found):
            if found != size:
                raise Damage(f"object {sha256} has {found} bytes, not {size}")


def _intact(directory: Path, step: int) -> Manifest:
    """The manifest of a step whose objects are all there at their sizes; Damage if it is not."""
    manifest, _ = read_manifest(directory, step)
    require_objects(directory, manifest)
    return manifest
