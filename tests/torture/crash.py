"""SIGKILL at every system call of a training that can change a file: the next attempt comes to the straight run's end.

A point is a call of the run or of its metrics, from the making of the directories to the removal of the owner's record:
killed at its entry; at its exit, done and not known to be; and a write half done. Of two ranks either dies, and the
other ends by itself. Then `nmoe train` goes on to the same state, ledger and files, nothing more and nothing less.
"""

import shutil
from functools import partial
from pathlib import Path

import attrs

from tests.torture import trainings
from tests.torture.calls import Call
from tests.torture.campaign import Batch, Tally
from tests.torture.tracer import MADE, Do
from tests.torture.trainings import Straight

TITLE = "crash points: SIGKILL before, in and after each system call of a training, 1 and 2 ranks / another end"
PARTS = 8
SAMPLE = 150  # every so manieth point
DONE = Do(answer=0)


@attrs.frozen(kw_only=True)
class Scene:
    """ranks, victim: how many train, and who dies. cut: begun by an attempt that was killed itself, as it saved."""

    ranks: int
    victim: int
    cut: bool = False


SCENES = {
    "one rank": Scene(ranks=1, victim=0),
    "one rank, a killed attempt before": Scene(ranks=1, victim=0, cut=True),
    "two ranks, the first": Scene(ranks=2, victim=0),
    "two ranks, the second": Scene(ranks=2, victim=1),
}


def batches(sample: bool) -> list[Batch]:
    if sample:
        return [Batch(name, partial(_batch, scene, 0, SAMPLE)) for name, scene in list(SCENES.items())[1:3]]
    return [
        Batch(f"{name}, {part + 1}/{PARTS}", partial(_batch, scene, part, PARTS))
        for part in range(PARTS)
        for name, scene in SCENES.items()
    ]


def _batch(scene: Scene, part: int, parts: int, directory: Path) -> Tally:
    straight = trainings.begin(directory)
    start = directory / "start"
    if scene.cut:
        cut_while_saving(start)
    else:
        start.mkdir()
    mine = points(calls_of(scene, start, directory / "recorded"))[part::parts]
    lost = []
    for call, moment in mine:
        disk = directory / "disk"
        shutil.copytree(start, disk)
        if wrong := _try(scene, straight, disk, call, moment):
            lost.append(f"{moment} {call.key}: {wrong}")
        shutil.rmtree(disk)
    return Tally(tried=len(mine), lost=tuple(lost))


def cut_while_saving(disk: Path) -> None:
    """An attempt that has died in its last save: an event torn, temporary files, objects that nobody needs."""
    calls = calls_of(SCENES["one rank"], None, disk)
    saving = [call for call in calls if call.name == "write" and call.path == "run/events.jsonl"][-2]
    shutil.rmtree(disk)
    ended = _killed(SCENES["one rank"], disk, saving, "half")
    assert ended.ends == ["signal 9"]


def calls_of(scene: Scene, start: Path | None, disk: Path, *, made: bool = False) -> list[Call]:
    """Of the victim, as long as nobody kills it; made: without those that have failed, as to make what is there."""
    if start is not None:
        shutil.copytree(start, disk)
    calls: list[Call] = []

    def told(call: Call, result: int) -> None:
        if result >= 0 or not made:
            calls.append(call)

    ended = trainings.attempt(disk, scene.ranks, only_fsync, told=told, traced=(scene.victim,))
    assert ended.ends == ["exit 0"] * scene.ranks, ended
    return calls


def only_fsync(call: Call) -> Do:
    """Every call is made, but for fsync, of which no process can see whether it was."""
    return DONE if call.name == "fsync" else MADE


def points(calls: list[Call]) -> list[tuple[Call, str]]:
    """Where to die, in an order that follows from what the calls are: threads come in another one each time."""
    found = []
    for number, call in enumerate(sorted(calls, key=lambda call: call.key)):
        moments = ["before", "after", *(["half"] if call.name == "write" and call.count > 1 else [])]
        found += [(call, moment) for moment in (moments if of_few(call) else [moments[number % len(moments)]])]
    return found


def of_few(call: Call) -> bool:
    """Objects' files are many and all alike: of each of their calls one thing is tried, in turn."""
    return "/objects/" not in call.path + call.target and "tmp/object" not in call.path


def _killed(scene: Scene, disk: Path, point: Call, moment: str) -> trainings.Ended:
    def decide(call: Call) -> Do:
        if call.key == point.key:
            done = 0 if call.name == "fsync" and moment == "after" else None
            return Do(kill="before" if moment == "before" else "after", answer=done,
                      most=call.count // 2 if moment == "half" else None)  # fmt: skip
        return only_fsync(call)

    return trainings.attempt(disk, scene.ranks, decide, traced=(scene.victim,))


def _try(scene: Scene, straight: Straight, disk: Path, point: Call, moment: str) -> str:
    """What is wrong after a death at that point, if anything is."""
    ended = _killed(scene, disk, point, moment)
    if ended.ends[scene.victim] != "signal 9":
        return f"the point was never reached: {ended.ends} {ended.said}"
    for rank, (end, said) in enumerate(zip(ended.ends, ended.said, strict=True)):
        if rank != scene.victim and (end not in ("exit 0", "exit 1") or "Traceback" in said):
            return f"rank {rank} ended as {end}: {said[-2000:]}"
    _, faults = trainings.whole(disk)
    return faults or trainings.going_on(disk, straight, scene.ranks)
