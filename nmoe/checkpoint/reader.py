"""Back from the disk into tensors, and nothing before everything has been verified, by all ranks together.

`open_head` follows HEAD to its manifest and hashes every object of it. Only what it returns can be
read, and `read_into` hashes the bytes once more where they have landed, so that a disk that gives
other bytes the second time cannot pass either.

The ranks agree on HEAD and its manifest, share the objects among them to verify, and go on only if all of them
can: what one finds is raised on all. Any number of ranks reads what any number has saved.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from nmoe.checkpoint import disk
from nmoe.checkpoint import format as layout
from nmoe.checkpoint.disk import Damage
from nmoe.checkpoint.manifest import Manifest, TensorRecord
from nmoe.checkpoint.parts import Span, Spans, differences
from nmoe.checkpoint.verify import check_objects, nothing, read_head, read_manifest
from nmoe.errors import RunError, fail
from nmoe.part import Part
from nmoe.rdep.control import Control
from nmoe.slices import DTYPE_BYTES, boundaries

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


def open_head(directory: str | os.PathLike[str], control: Control, *, threads: int = 4) -> Manifest | None:
    """The manifest that HEAD names, on all ranks, after every byte that it stands for has been verified.

    None if the run has no checkpoint yet. RunError N0303 names each damaged object, the step, and
    the command that moves HEAD to the newest checkpoint that verifies; N0322 a rank that reads another manifest
    than rank 0. What they raise, all ranks raise.
    """
    directory = Path(directory)
    manifest: Manifest | None = None

    def look() -> dict[str, Any] | None:
        nonlocal manifest
        manifest, seen = _read_head(directory)
        return seen

    # Rank 0 looks first: where there is nothing yet, a network file system must not remember that for the others.
    first = control.first("reading HEAD", look)
    if first is None:
        return None
    answers = control.together("comparing HEAD", lambda: first if control.rank == 0 else look())
    findings = [answer["damage"] for answer in answers if answer is not None and "damage" in answer]
    if findings and all(answer == answers[0] for answer in answers):
        raise damaged(directory, findings[:1], step=answers[0]["step"])
    for rank, answer in enumerate(answers):
        if answer != answers[0]:
            raise fail(
                "N0322", f"rank {rank} reads another HEAD than rank 0", place=str(directory),
                help="put `run_dir` on a file system that all nodes share, and let nothing else write there",
                notes=[f"rank {one}: {_said(answers[one])}" for one in (0, rank)],
            )  # fmt: skip
    assert manifest is not None
    share = list(manifest.objects.items())[control.rank :: control.ranks]
    broken = control.together(
        "verifying objects", lambda: check_objects(directory, share, threads=threads, alive=control.alive)
    )
    messages = {sha256: message for one in broken for sha256, message in one.items()}
    if messages:
        owners = {sha256: name for name, record in manifest.tensors.items() for sha256 in record.slices}
        findings = [
            f"object {sha256} {messages[sha256]}; tensor `{owners[sha256]}`"
            for sha256 in manifest.objects
            if sha256 in messages
        ]
        raise damaged(directory, list(dict.fromkeys(findings)), step=manifest.step)
    return manifest


def _read_head(directory: Path) -> tuple[Manifest | None, dict[str, Any] | None]:
    """HEAD's manifest, and what ranks compare of it: nothing where there is none yet, or what is wrong with it."""
    step, place = 0, "HEAD"
    try:
        head = read_head(directory)
        if head is None or head.manifest is None:
            return None, None
        step, place = head.step, str(layout.manifest_path(directory, head.step).relative_to(directory))
        manifest, sha256 = read_manifest(directory, head.step)
        if sha256 != head.manifest:
            raise Damage("is not the manifest that HEAD names")
    except Damage as damage:
        return None, {"step": step, "damage": f"`{place}` {damage}"}
    return manifest, {"step": step, "manifest": sha256}


def _said(answer: dict[str, Any] | None) -> str:
    if answer is None:
        return "no checkpoint"
    return answer.get("damage") or f"step {answer['step']}, manifest {answer['manifest']}"


def require_head(directory: str | os.PathLike[str], *, threads: int = 4) -> Manifest:
    """open_head by one process, where a checkpoint has to be; RunError N0304 if there is none yet."""
    manifest = open_head(directory, Control.alone(), threads=threads)
    if manifest is None:
        raise fail(
            "N0304", "the run has no checkpoint yet", place=str(directory),
            help="let it train: one is saved every `checkpoint_every` steps of [output], and when it is stopped",
        )  # fmt: skip
    return manifest


def read_into(
    directory: str | os.PathLike[str],
    manifest: Manifest,
    tensors: Mapping[str, Part],
    control: Control,
    *,
    threads: int = 4,
) -> None:
    """Overwrites each part in place with those elements of the tensor of that name in `manifest`, bit for bit.

    tensors: what this rank holds; others may hold the same. Over all ranks names, shapes and dtypes have to be
    those of the manifest: nothing left over on any rank, and each slice of each tensor held by one at least.
    Every difference is reported at once, on all ranks, and then nothing has been touched (RunError N0305).
    RunError N0303 if an object is no longer what was verified; the tensors are then not to be used.
    ValueError for parts that do not begin and end where slices do.
    """
    held = control.together(
        "what each rank holds", lambda: {name: attrs.astuple(span) for name, span in _spans(tensors).items()}
    )
    ranks = [{name: Span.parse(fields) for name, fields in one.items()} for one in held]
    _require_same(manifest, manifest.tensors, ranks)
    findings = control.together(
        "reading tensors", lambda: _read(Path(directory), manifest, tensors, threads, control.alive)
    )
    by_rank = [(f", read by rank {rank}" if control.ranks > 1 else "", one) for rank, one in enumerate(findings)]
    _require_whole(Path(directory), manifest, [finding + who for who, one in by_rank for finding in one])


def read_some(
    directory: str | os.PathLike[str], manifest: Manifest, tensors: Mapping[str, "torch.Tensor"], *, threads: int = 4
) -> None:
    """As read_into by one process, of some whole tensors: what `manifest` has beside them is left alone."""
    parts = {name: Part.whole(tensor) for name, tensor in tensors.items()}
    named = {name: record for name, record in manifest.tensors.items() if name in tensors}
    _require_same(manifest, named, [_spans(parts)])
    _require_whole(Path(directory), manifest, _read(Path(directory), manifest, parts, threads, nothing))


def _spans(parts: Mapping[str, Part]) -> dict[str, Span]:
    try:
        return {name: Span.of(name, part) for name, part in parts.items()}
    except Damage as damage:
        raise ValueError(f"cannot read: the caller {damage}") from None


def _read(
    directory: Path,
    manifest: Manifest,
    parts: Mapping[str, Part],
    threads: int,
    alive: Callable[[], None],
) -> list[str]:
    """Fills `parts`, which are `manifest`'s; what is wrong with the objects of the first that could not be filled."""
    import torch

    if sys.byteorder != "little":
        raise fail("N0306", "checkpoints are little-endian, and this machine is not")
    with torch.no_grad(), ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:
        for name, part in parts.items():
            record, target, span = manifest.tensors[name], part.tensor.detach(), Span.of(name, part)
            direct = target.device.type == "cpu" and target.is_contiguous()
            landing = target if direct else torch.empty(target.shape, dtype=target.dtype)
            content = landing.reshape(-1).view(torch.uint8).numpy().data
            width = DTYPE_BYTES[record.dtype]
            places = [
                content[(start - part.start) * width : (stop - part.start) * width]
                for start, stop in boundaries(name, record.shape, record.dtype)[span.first : span.last]
            ]
            hashes = record.slices[span.first : span.last]
            findings = []
            for finding in pool.map(lambda sha256, place: _read_object(directory, sha256, place), hashes, places):
                findings += [f"{finding}; tensor `{name}`"] if finding else []
                alive()
            if findings:
                return findings
            if not direct:
                target.copy_(landing)
    return []


def _require_whole(directory: Path, manifest: Manifest, findings: list[str]) -> None:
    if findings:
        raise damaged(directory, list(dict.fromkeys(findings)), step=manifest.step)


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


def _require_same(manifest: Manifest, records: Mapping[str, TensorRecord], ranks: Sequence[Spans]) -> None:
    """RunError N0305 unless the ranks hold what `records` name, which are `manifest`'s."""
    findings = differences(records, ranks)
    if findings:
        raise fail(
            "N0305", f"the checkpoint of step {manifest.step} does not have this program's tensors",
            help="it was saved by a program of another structure: continue it with the one that saved it",
            notes=findings[:12],
        )  # fmt: skip


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
