"""Saving while training goes on: a copy now, hashing and writing in the background, all ranks together.

`save` copies the parts of tensors that this rank owns and returns. From a GPU they are copied beside the next step,
whose update of them waits for that (`before_change`). A thread then does, in this order,

    1. begin      all ranks compare what they are about to save (step, counters, HEAD), and the room it needs
    2. objects    each slice into a temporary file, fsync, and its SHA-256 meanwhile; rename to that, in the
                  place of an object that is there already
    3. entries    fsync of every directory that got an object
    4. manifest   rank 0, from here on: every slice of every tensor is there once; temporary file, fsync,
                  rename, fsync of its directory
    5. caller     `before_head`: whatever must be durable before this step counts as saved
    6. HEAD       temporary file, fsync, rename, fsync
    7. retention  removes what none of the kept checkpoints needs
    8. end        the other ranks hear of it

so whatever moment a kill or a power cut picks, HEAD names a checkpoint that is whole: the one before,
or this one. A failure of the thread is raised by the next `check`, `wait` or `save`, never lost, and on all
ranks: those it did not happen on name the rank that failed first.

Kept are the newest `keep` checkpoints that are intact (manifest whole, objects there at their sizes),
HEAD always among them. A step ahead of HEAD, which a kill or a rewind left behind, is not kept.
"""

import datetime
import functools
import hashlib
import json
import os
import secrets
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from nmoe.checkpoint import disk
from nmoe.checkpoint import format as layout
from nmoe.checkpoint.disk import Damage
from nmoe.checkpoint.manifest import Head, Identity, Manifest, Parent, plain
from nmoe.checkpoint.objects import Address, Removed, require_objects, retain, sha256, store
from nmoe.checkpoint.parts import Span, Spans, join
from nmoe.checkpoint.reader import damaged
from nmoe.checkpoint.verify import read_head, read_manifest
from nmoe.errors import fail
from nmoe.part import Part
from nmoe.plan.canonical import canonical
from nmoe.rdep.control import Control

# Room for the manifest, directory entries and the rounding of files to blocks.
SPARE_BYTES = 64 << 20
BLOCK_BYTES = 4096
BEGIN = "the begin of a save"  # no step in it: ranks that save different ones have to meet to find out


@attrs.frozen(kw_only=True)
class Saved:
    """A checkpoint that HEAD names. objects, bytes: what was not there before, of total_bytes that it holds."""

    step: int
    manifest_sha256: str
    state_digest: str
    objects: int
    bytes: int
    total_bytes: int
    removed: tuple[Removed, ...]


class CheckpointWriter:
    """Saves into `directory`, which all ranks share, one checkpoint at a time. All ranks make and use it alike.

    keep: newest intact checkpoints that stay. threads: that write, with half as many that hash; they change no bit.
    control: the writer talks over a clone of it, whose time-out is how long a rank may show no progress. `address`
    names objects.
    Making one creates the directory with a HEAD that names nothing yet, and clears away what a killed
    or failed save has left (`removed`: the checkpoints among it), on rank 0, for which the others wait: only
    the run's owner may make one, after HEAD has been verified.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int, control: Control, threads: int = 4):
        if keep < 1 or threads < 1:
            raise ValueError(f"keep = {keep} and threads = {threads} have to be at least 1")
        if sys.byteorder != "little":
            raise fail("N0306", "checkpoints are little-endian, and this machine is not")
        self.directory = Path(directory)
        self.keep = keep
        self.threads = threads
        self.address: Address = sha256
        self._control = control.clone()
        # Not by process and host: containers repeat both, and a former attempt's rank may still be hanging on its disk.
        self._owner = f"{control.rank}.{secrets.token_hex(8)}"
        self._buffers: dict[str, Part] = {}
        self._copies: dict[torch.device, torch.cuda.Event] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._saved: Saved | None = None
        head, removed = self._control.first("making the checkpoints' directory", self._prepare)
        self._head = Head(**head)
        self.removed = tuple(Removed(**one) for one in removed)

    def _prepare(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        disk.make_directory(self.directory)
        disk.make_directory(layout.objects_directory(self.directory))
        if layout.temporary_directory(self.directory).exists():
            disk.remove_tree(layout.temporary_directory(self.directory))
        # This makes HEAD durable too, as `retain` needs it: who moved it last may have been killed before.
        disk.make_directory(layout.temporary_directory(self.directory))
        head, manifest = self._read_head()
        removed = retain(self.directory, manifest, keep=self.keep, alive=self._control.alive)
        return attrs.asdict(head), [attrs.asdict(one) for one in removed]

    def _read_head(self) -> tuple[Head, Manifest | None]:
        try:
            head = read_head(self.directory)
            if head is None:
                head = Head(step=0, manifest=None)
                self._put(layout.head_path(self.directory), head.encode())
            if head.manifest is None:
                return head, None
            manifest, sha256 = read_manifest(self.directory, head.step)
            if sha256 != head.manifest:
                raise Damage("does not name the manifest of its step")
        except Damage as damage:
            raise damaged(self.directory, [f"`HEAD` or its manifest {damage}"], step=0) from damage
        return head, manifest

    def save(
        self,
        *,
        step: int,
        tensors: Mapping[str, Part],
        state: Mapping[str, Any],
        identity: Identity,
        before_head: Callable[[], None] | None = None,
    ) -> None:
        """Copies the state of the finished step `step` and starts to write it; waits for the save before.

        tensors: what this rank owns of each, by logical name; any device, any strides. Over all ranks every
        slice of every tensor exactly once. Those on a GPU have to stay as they are until `before_change`.
        state: the training's counters, JSON without floats, the same on all ranks. identity, before_head: rank
        0's count; before_head runs in its writing thread, when all but HEAD is durable.
        RunError if the step is not beyond HEAD's, or if the save before has failed; ValueError for names, dtypes
        and values that no manifest can hold, and for parts that do not begin and end where slices do (nmoe.slices).
        What the ranks find only together is raised by `wait`, on all of them: RunError N0308 if there is not
        room, N0320 if a slice is missing or there twice, N0321 if they do not save the same.
        """
        self.wait()
        try:
            spans = self._check(step, tensors, state)
            self._snapshot(tensors)
        except BaseException as error:
            self._control.fail(BEGIN, error)
            raise
        parent = None
        if self._head.manifest is not None:
            parent = Parent(step=self._head.step, manifest=self._head.manifest)
        # A copy of now, as the reader will see it: the caller goes on to change its own.
        now = json.loads(canonical(dict(state)))
        self._thread = threading.Thread(
            target=self._run, args=(step, now, _room(spans, tensors), identity, parent, before_head), name="checkpoint"
        )
        self._thread.start()

    def before_change(self) -> None:
        """To be called before what the last `save` was given is changed: the current streams then wait for the copy."""
        for device, copied in self._copies.items():
            torch.cuda.current_stream(device).wait_event(copied)

    def prepare(self, tensors: Mapping[str, Part]) -> None:
        """Sees to the room that saves of such `tensors` need: on the disk, and in memory for the copy.

        RunError N0308, on all ranks, unless two checkpoints fit on the file system: one that stands and the one being
        written. A checkpoint that HEAD names has its room already. The first save then holds nobody up for longer than
        the others: fresh pages take three times as long as a copy into those that are there.
        """
        count = 2 if self._head.manifest is None else 1
        spans = {name: Span.of(name, part) for name, part in tensors.items()}
        ranks = self._control.together(
            "the room for checkpoints", lambda: {"room": _room(spans, tensors), "free": self._free()}
        )
        self._require_free(ranks, count)
        self._buffers = {name: Part(self._buffer(name, part), part.start, part.shape) for name, part in tensors.items()}

    def _check(self, step: int, tensors: Mapping[str, Part], state: Mapping[str, Any]) -> Spans:
        if step <= self._head.step:
            raise fail(
                "N0307", f"cannot save step {step}: HEAD names step {self._head.step}", place=str(self.directory),
                help="a run only goes on: continue from HEAD, or start another run in another `run_dir`",
            )  # fmt: skip
        plain(dict(state), "state")
        if state.get("step", step) != step:
            raise ValueError(f"the state says step {state['step']}, and is saved as step {step}")
        try:
            return {name: Span.of(name, part) for name, part in tensors.items()}
        except Damage as damage:
            raise ValueError(f"cannot save: the caller {damage}") from None

    def check(self) -> None:
        """Raises the failure of the writing thread, if it has failed; does not wait."""
        if self._failure is not None:
            self.wait()

    def done(self, timeout_s: float) -> bool:
        """Whether no save is in hand, after at most that many seconds; its result is told by `wait`."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> Saved | None:
        """Waits for the save in hand; what was saved last, None if nothing was. Raises the thread's failure."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return self._saved

    def _snapshot(self, tensors: Mapping[str, Part]) -> None:
        """Copies into buffers that are kept from save to save; from a GPU, its stream of copies does."""
        devices = {part.tensor.device for part in tensors.values() if part.tensor.is_cuda}
        streams = {device: _copying(device) for device in devices}
        for device, stream in streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))
        buffers: dict[str, Part] = {}
        with torch.no_grad():
            for name, part in tensors.items():
                tensor, buffer = part.tensor.detach(), self._buffer(name, part)
                with torch.cuda.stream(streams.get(tensor.device)):
                    buffer.copy_(tensor, non_blocking=tensor.is_cuda)
                buffers[name] = Part(buffer, part.start, part.shape)
        self._copies = {}
        for device, stream in streams.items():
            # The thread that waits for it sleeps meanwhile.
            self._copies[device] = stream.record_event(torch.cuda.Event(blocking=True))
        self._buffers = buffers

    def _buffer(self, name: str, part: Part) -> torch.Tensor:
        """Memory on the host for the elements of `part`: the buffer of the save before if it fits, else a new one."""
        known, tensor = self._buffers.get(name), part.tensor
        if known is not None and (known.tensor.shape, known.tensor.dtype) == (tensor.shape, tensor.dtype):
            return known.tensor
        buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        # Written once, so that its pages are there.
        buffer.zero_()
        return buffer

    def _run(self, *work: Any) -> None:
        try:
            self._saved = self._write(*work)
        except BaseException as failure:  # handed to the thread that asked, by check, wait or save
            self._failure = failure

    def _write(
        self,
        step: int,
        state: Mapping[str, Any],
        room: int,
        identity: Identity,
        parent: Parent | None,
        before_head: Callable[[], None] | None,
    ) -> Saved:
        control = self._control
        head = attrs.asdict(self._head)
        self._agree(
            control.together(
                BEGIN, lambda: {"step": step, "state": state, "head": head, "room": room, "free": self._free()}
            )
        )
        stored = control.together(f"the objects of step {step}", self._store, at_first=True)
        saved = control.first(
            f"the end of saving step {step}", lambda: self._finish(step, state, stored, identity, parent, before_head)
        )
        saved["removed"] = tuple(Removed(**one) for one in saved["removed"])
        done = Saved(**saved)
        self._head = Head(step=step, manifest=done.manifest_sha256)
        return done

    def _agree(self, ranks: list[dict[str, Any]]) -> None:
        """The same verdict on all ranks. RunError N0321 if they do not save the same, N0308 if there is not room."""
        notes = []
        for what in ("step", "head", "state"):
            for rank, theirs in enumerate(ranks):
                if theirs[what] != ranks[0][what]:
                    here, there = (json.dumps(one[what], sort_keys=True) for one in (ranks[0], theirs))
                    notes.append(f"the {what} of rank {rank} is {there}, of rank 0 {here}")
        if notes:
            raise fail(
                "N0321", f"the ranks do not save the same: {notes[0]}", place=str(self.directory),
                help="it has not been saved, HEAD stands as it was: all ranks must run the same plan on the same code",
                notes=notes[1:],
            )  # fmt: skip
        self._require_free(ranks, 1)

    def _require_free(self, ranks: list[dict[str, Any]], count: int) -> None:
        need, free = SPARE_BYTES + count * sum(one["room"] for one in ranks), min(one["free"] for one in ranks)
        if free < need:
            what = "a checkpoint needs" if count == 1 else "two checkpoints, the least that a run has, need"
            raise fail(
                "N0308", f"{what} {need / 1e6:,.1f} MB and the file system has {free / 1e6:,.1f} MB free",
                place=str(self.directory), help="free space, or lower `keep_checkpoints` in [output]",
            )  # fmt: skip

    def _free(self) -> int:
        with disk.naming("look for free space in", self.directory):
            return shutil.disk_usage(self.directory).free

    def _store(self) -> list[Any]:
        for copied in self._copies.values():
            copied.synchronize()
        stored = store(
            self.directory, self._buffers, threads=self.threads, owner=self._owner, alive=self._control.alive,
            address=self.address,
        )  # fmt: skip
        spans = {name: attrs.astuple(span) for name, span in stored.spans.items()}
        return [spans, stored.objects, stored.bytes]

    def _finish(
        self,
        step: int,
        state: Mapping[str, Any],
        ranks: list[Any],
        identity: Identity,
        parent: Parent | None,
        before_head: Callable[[], None] | None,
    ) -> dict[str, Any]:
        """Rank 0's part once all objects are durable; Saved as JSON."""
        spans = [{name: Span.parse(fields) for name, fields in one.items()} for one, _, _ in ranks]
        manifest = Manifest(
            step=step,
            state=state,
            tensors=join(spans, step=step),
            identity=identity,
            parent=parent,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        if len(ranks) > 1:
            self._require_sight(manifest)
        content = manifest.encode()
        seal = hashlib.sha256(content).hexdigest()
        disk.make_directory(layout.step_directory(self.directory, step))
        self._put(layout.manifest_path(self.directory, step), content)
        if before_head is not None:
            before_head()
        self._control.alive()
        head = Head(step=step, manifest=seal)
        self._put(layout.head_path(self.directory), head.encode())
        self._head = head
        saved = Saved(
            step=step,
            manifest_sha256=seal,
            state_digest=manifest.state_digest,
            objects=sum(objects for _, objects, _ in ranks),
            bytes=sum(written for _, _, written in ranks),
            total_bytes=sum(manifest.objects.values()),
            removed=retain(self.directory, manifest, keep=self.keep, alive=self._control.alive),
        )
        return attrs.asdict(saved)

    def _require_sight(self, manifest: Manifest) -> None:
        """RunError N0319 unless rank 0 sees what the others have written, as it does where they share a file system."""
        try:
            require_objects(self.directory, manifest)
        except Damage as damage:
            raise fail(
                "N0319", f"a rank has written what rank 0 does not see: {damage}", place=str(self.directory),
                help="put `run_dir` on a file system that all nodes share",
            ) from damage  # fmt: skip

    def _put(self, path: Path, content: bytes) -> None:
        """Makes a small file durable under its name; its temporary file is never beside it."""
        temporary = layout.temporary_directory(self.directory) / f"{path.name}.{self._owner}"
        disk.write_synced(temporary, content)
        disk.rename(temporary, path)
        disk.sync_directory(path.parent)


@functools.cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _room(spans: Spans, tensors: Mapping[str, Part]) -> int:
    """Bytes that this rank's part needs on the disk, none of them shared with another checkpoint."""
    return sum(
        part.tensor.numel() * part.tensor.element_size() + (spans[name].last - spans[name].first) * BLOCK_BYTES
        for name, part in tensors.items()
    )
