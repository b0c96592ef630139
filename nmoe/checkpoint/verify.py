"""Is what lies on the disk what was saved? Hashes only: no tensor is made, torch is not imported.

A checkpoint verifies if its manifest parses (canonical, sealed), has the hash that HEAD or the next
checkpoint's `parent` holds for it, and every object it names is a regular file of the right size
whose SHA-256 is its name. What lies about without being part of a kept checkpoint (a save that a
kill cut short, checkpoints ahead of HEAD) is a note, not a fault: nothing can be read from it.
"""

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs

from nmoe.checkpoint import disk
from nmoe.checkpoint import format as layout
from nmoe.checkpoint.disk import Damage
from nmoe.checkpoint.manifest import Head, Manifest
from nmoe.errors import fail


@attrs.frozen(kw_only=True)
class Fault:
    """One thing that is not as it was saved. path: relative to the checkpoints' directory; step: 0 for HEAD itself."""

    step: int
    path: str
    message: str

    def __str__(self) -> str:
        return f"`{self.path}` {self.message}" + (f" (step {self.step})" if self.step else "")


@attrs.frozen(kw_only=True)
class Checked:
    """One kept checkpoint after the check. The digests are empty where no manifest could be read."""

    step: int
    ok: bool
    manifest_sha256: str
    state_digest: str


@attrs.frozen(kw_only=True)
class Report:
    """All there is to say of a run's checkpoints. head: the manifest that HEAD names, if it can be read."""

    head: Manifest | None
    checkpoints: tuple[Checked, ...]
    faults: tuple[Fault, ...]
    notes: tuple[str, ...]


def read_head(directory: Path) -> Head | None:
    """HEAD's content, None where no checkpoint has ever been begun; Damage if it cannot be what was written."""
    if not layout.head_path(directory).exists() and not layout.steps_on_disk(directory):
        return None
    return Head.parse(disk.read(layout.head_path(directory), limit=layout.HEAD_LIMIT))


def read_manifest(directory: Path, step: int) -> tuple[Manifest, str]:
    """(manifest of that step, SHA-256 of its file); Damage if it is not a whole manifest of that step."""
    data = disk.read(layout.manifest_path(directory, step), limit=layout.MANIFEST_LIMIT)
    manifest = Manifest.parse(data)
    if manifest.step != step:
        raise Damage(f"is the manifest of step {manifest.step}")
    return manifest, hashlib.sha256(data).hexdigest()


def check_object(path: Path, sha256: str, size: int) -> None:
    """Damage unless the file has that size and that hash."""
    digest = hashlib.sha256()
    with disk.opened(path) as (descriptor, found):
        if found != size:
            raise Damage(f"has {found} bytes, not {size}")
        buffer = memoryview(bytearray(min(size, disk.CHUNK)))
        for start in range(0, size, disk.CHUNK):
            part = buffer[: min(disk.CHUNK, size - start)]
            disk.read_exactly(descriptor, part)
            digest.update(part)
    if digest.hexdigest() != sha256:
        raise Damage(f"has the content of {digest.hexdigest()[:16]}..., which is not its name")


def nothing() -> None:
    """What is called between two pieces of work where nobody waits for a sign of it."""


def check_objects(
    directory: Path, objects: Iterable[tuple[str, int]], *, threads: int, alive: Callable[[], None] = nothing
) -> dict[str, str]:
    """SHA-256 -> what is wrong, for every (SHA-256, bytes) whose object is not whole. alive: called after each."""

    def check(item: tuple[str, int]) -> tuple[str, str]:
        sha256, size = item
        try:
            check_object(layout.object_path(directory, sha256), sha256, size)
        except Damage as damage:
            return sha256, str(damage)
        return sha256, ""

    broken = {}
    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        for sha256, message in pool.map(check, objects):
            alive()
            if message:
                broken[sha256] = message
    return broken


def head_behind(directory: Path, saved: int) -> str:
    """What is wrong with HEAD if it names an earlier step than `saved`, which it has named before; or nothing.

    What is wrong with one that cannot be read is said where it is read.
    """
    try:
        head = read_head(directory)
    except Damage:
        return ""
    step = 0 if head is None else head.step
    if step >= saved:
        return ""
    named = f"names step {step}" if step else "is missing" if head is None else "names no checkpoint"
    return f"{named}, and the run's events tell that step {saved} has been saved"


def verify(directory: Path, *, threads: int = 4, saved: int = 0) -> Report:
    """Checks HEAD and every kept checkpoint below `directory`, whatever else is wrong.

    saved: a step that HEAD has named, as others know; a HEAD that names an earlier one is as good as unreadable.
    A run may be saving meanwhile: where there are faults and checkpoints have come or gone, they are
    checked again, because what was read may have been removed.
    """
    while True:
        before = _glance(directory)
        report = _verify(directory, threads, saved)
        if not report.faults or _glance(directory) == before:
            return report


def _glance(directory: Path) -> tuple[str, list[int]]:
    """What changes whenever a checkpoint comes or goes."""
    try:
        head = disk.read(layout.head_path(directory), limit=layout.HEAD_LIMIT).hex()
    except Damage as damage:
        head = str(damage)
    return head, layout.steps_on_disk(directory)


@attrs.frozen(kw_only=True)
class Kept:
    """The checkpoints of a run by what their manifests say; no object has been looked at.

    head: None where there is none yet, or where it cannot be read, which is then among the faults. steps: of the kept
    checkpoints, rising. manifests: of those whose manifest is whole, with the SHA-256 of its file.
    """

    head: Head | None
    steps: tuple[int, ...]
    manifests: dict[int, tuple[Manifest, str]]
    faults: tuple[Fault, ...]
    notes: tuple[str, ...]


def read_kept(directory: Path) -> Kept:
    """The kept checkpoints' manifests, each checked against its seal and the hash that its witness holds of it.

    A run may be saving meanwhile, as in `verify`.
    """
    while True:
        before = _glance(directory)
        kept = _read_kept(directory, saved=0)
        if not kept.faults or _glance(directory) == before:
            return kept


def _read_kept(directory: Path, *, saved: int) -> Kept:
    faults: list[Fault] = []
    head: Head | None = None
    try:
        head = read_head(directory)
        if behind := head_behind(directory, saved):
            raise Damage(behind)
    except Damage as damage:
        faults.append(Fault(step=0, path="HEAD", message=str(damage)))
    damaged_head = bool(faults)
    steps = layout.steps_on_disk(directory)
    kept = [step for step in steps if damaged_head or (head is not None and step <= head.step)]
    if head is not None and head.manifest is not None and head.step not in kept:
        kept.append(head.step)
    ahead = [step for step in steps if step not in kept]
    notes = [f"step {step} lies ahead of HEAD: an unfinished save, or left behind by a rewind" for step in ahead]

    manifests: dict[int, tuple[Manifest, str]] = {}
    expected = {head.step: (head.manifest, "HEAD")} if head is not None and head.manifest is not None else {}
    for step in reversed(kept):
        path = layout.manifest_path(directory, step)
        place = str(path.relative_to(directory))
        try:
            manifest, sha256 = read_manifest(directory, step)
        except Damage as damage:
            faults.append(Fault(step=step, path=place, message=str(damage)))
            continue
        wanted, witness = expected.get(step, (sha256, ""))
        if sha256 != wanted:
            faults.append(Fault(step=step, path=place, message=f"is not the manifest that {witness} names"))
        elif manifest.parent is not None:  # what stands in another's place is no witness of what came before
            expected[manifest.parent.step] = (manifest.parent.manifest, f"step {step}")
        manifests[step] = (manifest, sha256)
    notes.extend(
        f"step {step}, the parent of {witness}, is missing although older checkpoints are kept"
        for step, (_, witness) in expected.items()
        if step not in kept and kept and step > kept[0]
    )
    return Kept(
        head=head, steps=tuple(sorted(kept)), manifests=manifests, faults=tuple(faults), notes=tuple(notes)
    )


def _verify(directory: Path, threads: int, saved: int) -> Report:
    found = _read_kept(directory, saved=saved)
    head, kept, manifests = found.head, found.steps, found.manifests
    faults, notes = list(found.faults), list(found.notes)
    needed: dict[str, int] = {}
    for manifest, _ in manifests.values():
        needed |= manifest.objects
    broken = check_objects(directory, needed.items(), threads=threads)
    for step, (manifest, _) in manifests.items():
        faults.extend(
            Fault(
                step=step,
                path=f"objects/{sha256[:2]}/{sha256}",
                message=f"{broken[sha256]}; tensor `{_owner(manifest, sha256)}`",
            )
            for sha256 in manifest.objects
            if sha256 in broken
        )
    bad_steps = {fault.step for fault in faults}
    checkpoints = [
        Checked(step=step, ok=False, manifest_sha256="", state_digest="")
        if step not in manifests
        else Checked(
            step=step,
            ok=step not in bad_steps,
            manifest_sha256=manifests[step][1],
            state_digest=manifests[step][0].state_digest,
        )
        for step in kept
    ]
    notes.extend(_strays(directory, set(needed)))
    head_manifest = manifests.get(head.step, (None, ""))[0] if head is not None else None
    return Report(head=head_manifest, checkpoints=tuple(checkpoints), faults=tuple(faults), notes=tuple(notes))


def rewind(directory: Path, *, threads: int = 4, saved: int = 0) -> tuple[Head | None, Head, list[Fault]]:
    """Moves HEAD to the newest checkpoint that verifies, and says (HEAD before, HEAD now, faults met).

    saved: as for `verify`. HEAD before is None if it could not be read. Nothing is deleted: what lies
    ahead of HEAD is no longer reachable and is replaced when training gets there again. Where HEAD already
    names the newest one that verifies, nothing is written. RunError if none verifies.
    """
    report = verify(directory, threads=threads, saved=saved)
    try:
        before = read_head(directory)
    except Damage:
        before = None
    good = [checked for checked in report.checkpoints if checked.ok]
    if not good:
        raise fail(
            "N0302", "no checkpoint of this run verifies", place=str(directory),
            help="restore the directory from a copy, or start again in another `run_dir`",
            notes=[str(fault) for fault in report.faults[:12]],
        )  # fmt: skip
    now = Head(step=good[-1].step, manifest=good[-1].manifest_sha256)
    if now != before:
        disk.replace(layout.head_path(directory), now.encode())
    return before, now, list(report.faults)


def _owner(manifest: Manifest, sha256: str) -> str:
    return next(name for name, record in manifest.tensors.items() if sha256 in record.slices)


def _strays(directory: Path, needed: set[str]) -> list[str]:
    """Notes on files that belong to no kept checkpoint."""
    steps = [layout.step_directory(directory, step).name for step in layout.steps_on_disk(directory)]
    strays = [name for name in _names(directory) if name not in {"HEAD", "objects", "tmp", *steps}]
    strays += [f"{step}/{name}" for step in steps for name in _names(directory / step) if name != "manifest.json"]
    unreferenced = 0
    for folder in _names(layout.objects_directory(directory)):
        for name in _names(layout.objects_directory(directory) / folder):
            if not layout.DIGEST.fullmatch(name) or folder != name[:2]:
                strays.append(f"objects/{folder}/{name}")
            elif name not in needed:
                unreferenced += 1
    notes = [f"`{name}` is no file of a checkpoint" for name in strays]
    if unreferenced:
        notes.append(f"{unreferenced} objects belong to no kept checkpoint; the next attempt or save removes them")
    unfinished = len(_names(layout.temporary_directory(directory)))
    if unfinished:
        notes.append(f"{unfinished} temporary files of an unfinished save; the next attempt removes them")
    return notes


def _names(directory: Path) -> list[str]:
    """What a directory holds, sorted; nothing where it is none, or is one no longer."""
    try:
        return sorted(entry.name for entry in directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
