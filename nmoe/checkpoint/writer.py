"""Saving while training goes on: a copy now, hashing and writing in the background.

`save` copies the tensors and returns; a thread then does, in this order,

    1. objects    SHA-256 of each slice; temporary file, fsync, rename; an object that is there already
                  is kept if it has that hash, and written again if not
    2. entries    fsync of every directory that got an object
    3. manifest   temporary file, fsync, rename, fsync of its directory
    4. caller     `before_head`: whatever must be durable before this step counts as saved
    5. HEAD       temporary file, fsync, rename, fsync
    6. retention  removes what none of the kept checkpoints needs

so whatever moment a kill or a power cut picks, HEAD names a checkpoint that is whole: the one before,
or this one. A failure of the thread is raised by the next `check`, `wait` or `save`, never lost.

Kept are the newest `keep` checkpoints that are intact (manifest whole, objects there at their sizes),
HEAD always among them. A step ahead of HEAD, which a kill or a rewind left behind, is not kept.
"""

import datetime
import hashlib
import json
import os
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
from nmoe.checkpoint.objects import Removed, retain, store
from nmoe.checkpoint.reader import damaged, dtype_name
from nmoe.checkpoint.verify import read_head, read_manifest
from nmoe.errors import fail
from nmoe.plan.canonical import canonical

# Room for the manifest, directory entries and the rounding of files to blocks.
SPARE_BYTES = 64 << 20
BLOCK_BYTES = 4096


@attrs.frozen(kw_only=True)
class Saved:
    """A checkpoint that HEAD names. objects, bytes: what had to be written, of total_bytes that it holds."""

    step: int
    manifest_sha256: str
    state_digest: str
    objects: int
    bytes: int
    total_bytes: int
    removed: tuple[Removed, ...]


class CheckpointWriter:
    """Saves into `directory`, one checkpoint at a time.

    keep: newest intact checkpoints that stay. threads: that hash and write; they change no bit.
    Making one creates the directory with a HEAD that names nothing yet, and clears away what a killed
    or failed save has left (`removed`: the checkpoints among it): only the run's owner may make one,
    after HEAD has been verified.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int, threads: int = 4):
        if keep < 1 or threads < 1:
            raise ValueError(f"keep = {keep} and threads = {threads} have to be at least 1")
        if sys.byteorder != "little":
            raise fail("N0306", "checkpoints are little-endian, and this machine is not")
        self.directory = Path(directory)
        self.keep = keep
        self.threads = threads
        self._buffers: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._saved: Saved | None = None
        disk.make_directory(self.directory)
        disk.make_directory(layout.objects_directory(self.directory))
        if layout.temporary_directory(self.directory).exists():
            disk.remove_tree(layout.temporary_directory(self.directory))
        disk.make_directory(layout.temporary_directory(self.directory))
        self._head, manifest = self._read_head()
        self.removed = retain(self.directory, manifest, keep=keep)

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
        tensors: Mapping[str, torch.Tensor],
        state: Mapping[str, Any],
        identity: Identity,
        before_head: Callable[[], None] | None = None,
    ) -> None:
        """Copies the state of the finished step `step` and starts to write it; waits for the save before.

        tensors: by logical name; any device, any strides. state: the training's counters, JSON without
        floats. before_head runs in the writing thread, when all but HEAD is durable. RunError if
        there is not room for the copy on the disk, if the step is not beyond HEAD's, or if the save
        before has failed; ValueError for names, dtypes and values that no manifest can hold.
        """
        self.wait()
        if step <= self._head.step:
            raise fail(
                "N0307", f"cannot save step {step}: HEAD names step {self._head.step}", place=str(self.directory),
                help="a run only goes on: continue from HEAD, or start another run in another `run_dir`",
            )  # fmt: skip
        plain(dict(state), "state")
        if state.get("step", step) != step:
            raise ValueError(f"the state says step {state['step']}, and is saved as step {step}")
        for name, tensor in tensors.items():
            try:
                layout.check_tensor(name, tuple(tensor.shape), dtype_name(tensor))
            except Damage as damage:
                raise ValueError(f"cannot save: the caller {damage}") from None
        self._check_room(tensors)
        self._snapshot(tensors)
        parent = None
        if self._head.manifest is not None:
            parent = Parent(step=self._head.step, manifest=self._head.manifest)
        # A copy of now, as the reader will see it: the caller goes on to change its own.
        now = json.loads(canonical(dict(state)))
        self._thread = threading.Thread(
            target=self._run, args=(step, now, identity, parent, before_head), name="checkpoint"
        )
        self._thread.start()

    def check(self) -> None:
        """Raises the failure of the writing thread, if it has failed; does not wait."""
        if self._failure is not None:
            self.wait()

    def wait(self) -> Saved | None:
        """Waits for the save in hand; what was saved last, None if nothing was. Raises the thread's failure."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return self._saved

    def _check_room(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """RunError N0308 unless the file system has room for every byte of the state, none of it shared."""
        need = SPARE_BYTES
        for name, tensor in tensors.items():
            count = layout.slice_count(name, tuple(tensor.shape), dtype_name(tensor))
            need += tensor.numel() * tensor.element_size() + count * BLOCK_BYTES
        with disk.naming("look for free space in", self.directory):
            free = shutil.disk_usage(self.directory).free
        if free < need:
            raise fail(
                "N0308", f"a checkpoint needs {need / 1e6:,.1f} MB and the file system has {free / 1e6:,.1f} MB free",
                place=str(self.directory), help="free space, or lower `keep_checkpoints` in [output]",
            )  # fmt: skip

    def _snapshot(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copies into buffers that are kept from save to save, so that their pages are there already."""
        buffers: dict[str, torch.Tensor] = {}
        devices = set()
        with torch.no_grad():
            for name, tensor in tensors.items():
                buffer = self._buffers.get(name)
                if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                    buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                buffer.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
                if tensor.is_cuda:
                    devices.add(tensor.device)
                buffers[name] = buffer
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        self._buffers = buffers

    def _run(self, *work: Any) -> None:
        try:
            self._saved = self._write(*work)
        except BaseException as failure:  # handed to the thread that asked, by check, wait or save
            self._failure = failure

    def _write(
        self,
        step: int,
        state: Mapping[str, Any],
        identity: Identity,
        parent: Parent | None,
        before_head: Callable[[], None] | None,
    ) -> Saved:
        stored = store(self.directory, self._buffers, threads=self.threads)
        manifest = Manifest(
            step=step,
            state=state,
            tensors=stored.records,
            identity=identity,
            parent=parent,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        content = manifest.encode()
        sha256 = hashlib.sha256(content).hexdigest()
        disk.make_directory(layout.step_directory(self.directory, step))
        self._put(layout.manifest_path(self.directory, step), content)
        if before_head is not None:
            before_head()
        head = Head(step=step, manifest=sha256)
        self._put(layout.head_path(self.directory), head.encode())
        self._head = head
        return Saved(
            step=step,
            manifest_sha256=sha256,
            state_digest=manifest.state_digest,
            objects=stored.objects,
            bytes=stored.bytes,
            total_bytes=sum(manifest.objects.values()),
            removed=retain(self.directory, manifest, keep=self.keep),
        )

    def _put(self, path: Path, content: bytes) -> None:
        """Makes a small file durable under its name; its temporary file is never beside it."""
        temporary = layout.temporary_directory(self.directory) / f"{path.name}.{os.getpid()}"
        disk.write_synced(temporary, content)
        disk.rename(temporary, path)
        disk.sync_directory(path.parent)
