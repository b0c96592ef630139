"""Every system call of a training that can fail fails once, or from then on, or writes less than it was asked to.

After a failure: status 1 and a diagnostic, never a traceback; HEAD where it was or further, all checkpoints whole;
error.json says it, where the run's directory had been opened and the disk takes it. When the fault has gone the same
command comes to the straight run's end. A write that is cut short and a call that is interrupted are no failure.
"""

import errno
import json
import os
import shutil
from pathlib import Path

import attrs

from tests.torture import trainings
from tests.torture.calls import Call
from tests.torture.campaign import Batch, Tally
from tests.torture.scenes import SCENES, Scene, batches_of, begun, calls_of, of_few, only_fsync, sample_of
from tests.torture.tracer import Do
from tests.torture.trainings import Straight

TITLE = "faults: ENOSPC, EIO, EDQUOT, EROFS, short writes, EINTR at each system call, once or for good / not survived"
SAMPLE = 260
ERRORS = {
    "open": ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EMFILE"),
    "write": ("ENOSPC", "EDQUOT", "EIO"),
    "fsync": ("EIO", "ENOSPC", "EDQUOT"),
    "close": ("EIO", "EDQUOT"),
    "rename": ("ENOSPC", "EIO", "EROFS"),
    "mkdir": ("ENOSPC", "EDQUOT", "EIO"),
    "unlink": ("EIO", "EROFS"),
    "rmdir": ("EIO",),
    "ftruncate": ("EIO",),
    "flock": ("ENOLCK", "EIO"),
}
"""Of each call, what the manual's section 2 has for a disk that is full, over its quota, broken or set read-only."""

SURVIVED = {"write": ("one byte", "half", "EINTR"), "open": ("EINTR",), "fsync": ("EINTR",), "flock": ("EINTR",)}
FULL = ("open", "write", "mkdir", "rename", "fsync")
"""What a full disk may refuse; from then on it does so where there is content to be kept, and for directories."""

FOR_GOOD = "ENOSPC from then on"
NOT_OURS = ("run", "run/lock", "run/owner.json.tmp", "run/owner.json", ".")
"""Where the directory is not known to be this run's yet, or has been given back."""


@attrs.frozen(kw_only=True)
class Fault:
    call: Call
    how: str

    @property
    def name(self) -> str:
        return f"{self.how} at {self.call.key}"


def batches(sample: bool) -> list[Batch]:
    names = list(SCENES)
    return sample_of(_batch, names[1:3], SAMPLE) if sample else batches_of(_batch, names)


def _batch(name: str, part: int, parts: int, directory: Path) -> Tally:
    scene = SCENES[name]
    straight, start = begun(scene, directory)
    mine = faults_of(scene, calls_of(scene, start, directory / "recorded", made=True))[part::parts]
    lost = []
    for fault in mine:
        disk = directory / "disk"
        shutil.copytree(start, disk)
        if wrong := _try(scene, straight, disk, fault):
            lost.append(f"{fault.name}: {wrong}")
        shutil.rmtree(disk)
    return Tally(tried=len(mine), lost=tuple(lost))


def faults_of(scene: Scene, calls: list[Call]) -> list[Fault]:
    """All faults of each call of the one rank that starts a run, but for objects' files; of others one, in turn."""
    found = []
    for number, call in enumerate(sorted(calls, key=lambda call: call.key)):
        hows = [*ERRORS[call.name], *SURVIVED.get(call.name, ()), *((FOR_GOOD,) if call.name in FULL else ())]
        if not of_few(call) or scene != SCENES["one rank"]:
            hows = [hows[number % len(hows)]]
        found += [Fault(call=call, how=how) for how in hows]
    return found


def _try(scene: Scene, straight: Straight, disk: Path, fault: Fault) -> str:
    """What is wrong after a training with that fault, if anything is."""
    head, _ = trainings.whole(disk)
    met: list[Call] = []

    def decide(call: Call) -> Do:
        if call.key == fault.call.key:
            met.append(call)
            if fault.how in ("one byte", "half"):
                return Do(most=1 if fault.how == "one byte" else max(call.count // 2, 1))
            return Do(answer=-getattr(errno, fault.how.split()[0]))
        if met and fault.how == FOR_GOOD and call.name in ("write", "mkdir", "fsync"):
            return Do(answer=-errno.ENOSPC)
        return only_fsync(call)

    ended = trainings.attempt(disk, scene.ranks, decide, traced=(scene.victim,))
    if not met:
        return f"the call was never made: {ended.ends} {ended.said}"
    survived = fault.how in SURVIVED.get(fault.call.name, ())
    wrong = "" if survived else _failure(ended, disk, fault)
    if survived and ended.ends != ["exit 0"] * scene.ranks:
        wrong = f"it was no failure: {ended.ends} {ended.said}"
    now, faults = trainings.whole(disk)
    if now < head:
        wrong = wrong or f"HEAD went back from step {head} to step {now}"
    return wrong or faults or trainings.going_on(disk, straight, scene.ranks)


def _failure(ended: trainings.Ended, disk: Path, fault: Fault) -> str:
    """What is wrong with how a failure was told."""
    name = fault.how.split()[0]
    reason = os.strerror(getattr(errno, name)).lower()
    for rank, (end, said) in enumerate(zip(ended.ends, ended.said, strict=True)):
        if rank != fault.call.rank and end == "exit 0" and trainings.whole(disk)[0] == trainings.STEPS:
            continue  # all that the ranks do together had been done
        if end != "exit 1" or "Traceback" in said or "error[N" not in said:
            return f"rank {rank} ended as {end}: {said[-3000:]}"
        if reason not in said:
            return f"rank {rank} does not say `{reason}`: {said[-3000:]}"
    if fault.how == FOR_GOOD or fault.call.path in NOT_OURS:
        return ""
    errors = [json.loads(file.read_text()) for file in (disk / "run").glob("error*.json")]
    if not any(reason in json.dumps(error) for error in errors):
        return f"error.json does not say `{reason}`: {errors} {ended.said}"
    return ""
