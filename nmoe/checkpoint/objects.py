"""Slices into content-addressed files, and the removal of files that no kept checkpoint needs."""

import hashlib
import itertools
import math
import os
import threading
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
from nmoe.checkpoint.verify import check_object, nothing, read_head, read_manifest
from nmoe.errors import fail
from nmoe.part import Part
from nmoe.slices import boundaries

T = TypeVar("T")


@attrs.frozen(kw_only=True)
class Stored:
    """spans: what has been stored of every tensor, by name. objects, bytes: what had to be written for them."""

    spans: dict[str, Span]
    objects: int
    bytes: int


@attrs.frozen(kw_only=True)
class Removed:
    """A checkpoint that was taken away, and why."""

    step: int
    reason: str


def store(
    directory: Path, parts: Mapping[str, Part], *, threads: int, owner: str = "0", alive: Callable[[], None] = nothing
) -> Stored:
    """Stores the slices of parts, contiguous on the CPU; when it returns, each object and its name is durable.

    owner: in the names of temporary files; no two that may be at work in the directory have the same. alive: called
    as the work goes on.

    Each thread hashes a slice and writes it in one go: small files then share the journal's commits.
    An object that is there already counts only after it has been hashed. RunError N0301 if a file
    cannot be written, N0317 if a value is not finite (an update can overflow after the last look at the
    gradients); what has been written by then is no part of any checkpoint.
    """
    folders: set[Path] = set()
    claimed: set[str] = set()
    written: list[int] = []
    lock = threading.Lock()
    numbers = itertools.count()

    def put(name: str, start: int, values: torch.Tensor) -> str:
        require_finite(name, start, values)
        content = values.view(torch.uint8).numpy().data
        sha256 = hashlib.sha256(content).hexdigest()
        path = layout.object_path(directory, sha256)
        with lock:
            if sha256 in claimed:
                return sha256
            claimed.add(sha256)
            folders.add(path.parent)
        with disk.naming("make directory", path.parent):
            path.parent.mkdir(exist_ok=True)
        if path.exists():
            try:
                check_object(path, sha256, len(content))
                return sha256
            except Damage:
                pass  # a damaged object is replaced by the right one
        temporary = layout.temporary_directory(directory) / f"object.{owner}.{next(numbers)}"
        disk.write_synced(temporary, content)
        disk.rename(temporary, path)
        written.append(len(content))
        return sha256

    pool = ThreadPoolExecutor(threads, thread_name_prefix="object")
    try:
        pending = {}
        spans = {}
        for name, part in parts.items():
            values = part.tensor.reshape(-1)
            spans[name] = span = Span.of(name, part)
            pending[name] = [
                pool.submit(put, name, start, values[start - part.start : stop - part.start])
                for start, stop in boundaries(name, part.shape, span.dtype)[span.first : span.last]
            ]
        for name, futures in pending.items():
            spans[name] = attrs.evolve(spans[name], hashes=tuple(_each(futures, alive)))
        synced = [pool.submit(disk.sync_directory, folder) for folder in sorted(folders)]
        list(_each(synced, alive))
        disk.sync_directory(layout.objects_directory(directory))
    finally:
        pool.shutdown(cancel_futures=True)
    return Stored(spans=spans, objects=len(written), bytes=sum(written))


def _each(futures: Iterable[Future[T]], alive: Callable[[], None]) -> Iterator[T]:
    """Their results in order, with a sign of work after each."""
    for future in futures:
        yield future.result()
        alive()


def require_finite(name: str, start: int, values: torch.Tensor) -> None:
    """RunError N0317 if one of a tensor's elements from `start` on is not finite."""
    if not values.is_floating_point():
        return
    if values.element_size() > 1:
        # In one pass, NaN wins both ends; torch.isfinite takes ten times as long, longer than SHA-256.
        least, largest = torch.aminmax(values)
        if math.isfinite(least) and math.isfinite(largest):
            return
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        place = int((~finite).nonzero()[0])
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
