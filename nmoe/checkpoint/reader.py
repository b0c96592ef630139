"""Back from the disk into tensors, and nothing before everything has been verified.

`open_head` follows HEAD to its manifest and hashes every object of it. Only what it returns can be
read, and `read_into` hashes the bytes once more where they have landed, so that a disk that gives
other bytes the second time cannot pass either.
"""

import hashlib
import os
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from nmoe.checkpoint import disk
from nmoe.checkpoint import format as layout
from nmoe.checkpoint.disk import Damage
from nmoe.checkpoint.manifest import Manifest, TensorRecord
from nmoe.checkpoint.verify import check_objects, read_head, read_manifest
from nmoe.errors import RunError, fail

if TYPE_CHECKING:
    import torch


def head_step(directory: str | os.PathLike[str]) -> int:
    """The step that HEAD names, 0 where there is no checkpoint yet; only HEAD itself is read and checked."""
    directory = Path(directory)
    try:
        head = read_head(directory)
    except Damage as damage:
        raise damaged(directory, [f"`HEAD` {damage}"], step=0) from damage
    return 0 if head is None else head.step


def open_head(directory: str | os.PathLike[str], *, threads: int = 4) -> Manifest | None:
    """The manifest that HEAD names, after every byte that it stands for has been verified.

    None if the run has no checkpoint yet. RunError N0303 names each damaged object, the step, and
    the command that moves HEAD to the newest checkpoint that verifies.
    """
    directory = Path(directory)
    step, place = 0, "HEAD"
    try:
        head = read_head(directory)
        if head is None or head.manifest is None:
            return None
        step, place = head.step, str(layout.manifest_path(directory, head.step).relative_to(directory))
        manifest, sha256 = read_manifest(directory, head.step)
        if sha256 != head.manifest:
            raise Damage("is not the manifest that HEAD names")
    except Damage as damage:
        raise damaged(directory, [f"`{place}` {damage}"], step=step) from damage
    broken = check_objects(directory, manifest.objects.items(), threads=threads)
    if broken:
        owners = {sha256: name for name, record in manifest.tensors.items() for sha256 in record.slices}
        findings = [f"object {sha256} {message}; tensor `{owners[sha256]}`" for sha256, message in broken.items()]
        raise damaged(directory, findings, step=step)
    return manifest


def require_head(directory: str | os.PathLike[str], *, threads: int = 4) -> Manifest:
    """open_head where a checkpoint has to be; RunError N0304 if there is none yet."""
    manifest = open_head(directory, threads=threads)
    if manifest is None:
        raise fail(
            "N0304", "the run has no checkpoint yet", place=str(directory),
            help="let it train: one is saved every `checkpoint_every` steps of [output], and when it is stopped",
        )  # fmt: skip
    return manifest


def read_into(
    directory: str | os.PathLike[str], manifest: Manifest, tensors: Mapping[str, "torch.Tensor"], *, threads: int = 4
) -> None:
    """Overwrites each of `tensors` in place with the tensor of that name in `manifest`, bit for bit.

    Names, shapes and dtypes have to be equal, nothing missing and nothing left over; every
    difference is reported at once, and then nothing has been touched (RunError N0305). RunError
    N0303 if an object is no longer what was verified; the tensors are then not to be used.
    """
    _check_names(manifest, manifest.tensors, tensors)
    _read(Path(directory), manifest, tensors, threads)


def read_some(
    directory: str | os.PathLike[str], manifest: Manifest, tensors: Mapping[str, "torch.Tensor"], *, threads: int = 4
) -> None:
    """As read_into, of a part of the checkpoint: what `manifest` has beside `tensors` is left alone."""
    named = {name: record for name, record in manifest.tensors.items() if name in tensors}
    _check_names(manifest, named, tensors)
    _read(Path(directory), manifest, tensors, threads)


def _read(directory: Path, manifest: Manifest, tensors: Mapping[str, "torch.Tensor"], threads: int) -> None:
    """Fills `tensors`, whose names, shapes and dtypes have been checked."""
    import torch

    if sys.byteorder != "little":
        raise fail("N0306", "checkpoints are little-endian, and this machine is not")
    with torch.no_grad(), ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:
        for name, tensor in tensors.items():
            record, target = manifest.tensors[name], tensor.detach()
            direct = target.device.type == "cpu" and target.is_contiguous()
            landing = target if direct else torch.empty(record.shape, dtype=target.dtype)
            content = landing.reshape(-1).view(torch.uint8).numpy().data
            width = layout.DTYPE_BYTES[record.dtype]
            cuts = layout.boundaries(name, record.shape, record.dtype)
            parts = [content[start * width : stop * width] for start, stop in cuts]
            reads = pool.map(lambda sha256, part: _read_object(directory, sha256, part), record.slices, parts)
            findings = [finding for finding in reads if finding]
            if findings:
                raise damaged(directory, [f"{finding}; tensor `{name}`" for finding in findings], step=manifest.step)
            if not direct:
                target.copy_(landing)


def _read_object(directory: Path, sha256: str, part: memoryview) -> str:
    """Fills `part` with the object; what is wrong with it, or nothing."""
    try:
        with disk.opened(layout.object_path(directory, sha256)) as (descriptor, size):
            if size != len(part):
                raise Damage(f"has {size} bytes, not {len(part)}")
            disk.read_exactly(descriptor, part)
        if hashlib.sha256(part).hexdigest() != sha256:
            raise Damage("has other content than its name")
    except Damage as damage:
        return f"object {sha256} {damage}"
    return ""


def _check_names(
    manifest: Manifest, records: Mapping[str, TensorRecord], tensors: Mapping[str, "torch.Tensor"]
) -> None:
    """RunError N0305 unless `tensors` are those of `records`, which are `manifest`'s."""
    saved, wanted = records.keys(), tensors.keys()
    findings = [f"`{name}` is in the checkpoint and not in this program" for name in saved - wanted]
    findings += [f"`{name}` is in this program and not in the checkpoint" for name in wanted - saved]
    for name in saved & wanted:
        record, tensor = records[name], tensors[name]
        there, here = (record.dtype, record.shape), (dtype_name(tensor), tuple(tensor.shape))
        if there != here:
            kinds = [f"{dtype} {list(shape)}" for dtype, shape in (there, here)]
            findings.append(f"`{name}` is {kinds[0]} in the checkpoint, {kinds[1]} here")
    if findings:
        raise fail(
            "N0305", f"the checkpoint of step {manifest.step} does not have this program's tensors",
            help="it was saved by a program of another structure: continue it with the one that saved it",
            notes=sorted(findings)[:12],
        )  # fmt: skip


def dtype_name(tensor: "torch.Tensor") -> str:
    """The name under which a manifest records the tensor's dtype, such as "bfloat16"."""
    return str(tensor.dtype).removeprefix("torch.")


def damaged(directory: Path, findings: list[str], *, step: int) -> RunError:
    """The failure that a damaged checkpoint is, with the command that goes on from an older one."""
    more = len(findings) - 1
    of_step = f" of step {step}" if step else ""
    return fail(
        "N0303", f"the checkpoint{of_step} is damaged: {findings[0]}" + (f", and {more} more" if more else ""),
        place=str(directory),
        help=f"nmoe verify {directory.parent} --rewind moves HEAD to the newest checkpoint that verifies",
        notes=findings[1:12],
    )  # fmt: skip
