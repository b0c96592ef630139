"""SIGKILL at every system call of a training that can change a file: the next attempt comes to the straight run's end.

A point is a call of the run or of its metrics, from the making of the directories to the removal of the owner's record:
killed at its entry; at its exit, done and not known to be; and a write half done. Of two ranks either dies, and the
other ends by itself. Then `nmoe train` goes on to the same state, ledger and files, nothing more and nothing less.
"""

import shutil
from pathlib import Path

from tests.torture import trainings
from tests.torture.calls import Call
from tests.torture.campaign import Batch, Tally
from tests.torture.scenes import SCENES, Scene, batches_of, begun, calls_of, killed, of_few, sample_of
from tests.torture.trainings import Straight

TITLE = "crash points: SIGKILL before, in and after each system call of a training, 1 and 2 ranks / another end"
SAMPLE = 150  # every so manieth point


def batches(sample: bool) -> list[Batch]:
    names = list(SCENES)
    return sample_of(_batch, names[1:3], SAMPLE) if sample else batches_of(_batch, names)


def _batch(name: str, part: int, parts: int, directory: Path) -> Tally:
    scene = SCENES[name]
    straight, start = begun(scene, directory)
    mine = points(calls_of(scene, start, directory / "recorded"))[part::parts]
    lost = []
    for call, moment in mine:
        disk = directory / "disk"
        shutil.copytree(start, disk)
        if wrong := _try(scene, straight, disk, call, moment):
            lost.append(f"{moment} {call.key}: {wrong}")
        shutil.rmtree(disk)
    return Tally(tried=len(mine), lost=tuple(lost))


def points(calls: list[Call]) -> list[tuple[Call, str]]:
    """Where to die, in an order that follows from what the calls are: threads come in another one each time."""
    found = []
    for number, call in enumerate(sorted(calls, key=lambda call: call.key)):
        moments = ["before", "after", *(["half"] if call.name == "write" and call.count > 1 else [])]
        found += [(call, moment) for moment in (moments if of_few(call) else [moments[number % len(moments)]])]
    return found


def _try(scene: Scene, straight: Straight, disk: Path, point: Call, moment: str) -> str:
    """What is wrong after a death at that point, if anything is."""
    ended = killed(scene, disk, point, moment)
    if ended.ends[scene.victim] != "signal 9":
        return f"the point was never reached: {ended.ends} {ended.said}"
    for rank, (end, said) in enumerate(zip(ended.ends, ended.said, strict=True)):
        if rank != scene.victim and (end not in ("exit 0", "exit 1") or "Traceback" in said):
            return f"rank {rank} ended as {end}: {said[-2000:]}"
    _, faults = trainings.whole(disk)
    return faults or trainings.going_on(disk, straight, scene.ranks)
