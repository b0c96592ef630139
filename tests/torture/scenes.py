"""The trainings that crash, lose power or have a fault: on one rank or two, begun on an empty disk or a torn one.

A campaign divides what it tries in a scene into PARTS, a batch each; its sample is a small share of a few scenes.
"""

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import attrs

from tests.torture import trainings
from tests.torture.calls import Call
from tests.torture.campaign import Batch, Tally
from tests.torture.tracer import MADE, Do
from tests.torture.trainings import Straight

PARTS = 8
DONE = Do(answer=0)
Try = Callable[[str, int, int, Path], Tally]
"""A batch of a scene, by its name: part, parts, and where."""


@attrs.frozen(kw_only=True)
class Scene:
    """ranks: how many train; victim: whose calls are tried. cut: begun by an attempt that was killed as it saved."""

    ranks: int
    victim: int = 0
    cut: bool = False


SCENES = {
    "one rank": Scene(ranks=1),
    "one rank, a killed attempt before": Scene(ranks=1, cut=True),
    "two ranks, the first": Scene(ranks=2),
    "two ranks, the second": Scene(ranks=2, victim=1),
}


def batches_of(attempt: Try, scenes: Sequence[str]) -> list[Batch]:
    """All of some scenes."""
    return [
        Batch(f"{name}, {part + 1}/{PARTS}", partial(attempt, name, part, PARTS))
        for part in range(PARTS)
        for name in scenes
    ]


def sample_of(attempt: Try, scenes: Sequence[str], parts: int) -> list[Batch]:
    """One of so many parts of each scene."""
    return [Batch(name, partial(attempt, name, 0, parts)) for name in scenes]


def begun(scene: Scene, directory: Path) -> tuple[Straight, Path]:
    """The straight run, and the disk on which the scene begins."""
    straight, start = trainings.begin(directory), directory / "start"
    if scene.cut:
        cut_while_saving(start)
    else:
        start.mkdir()
    return straight, start


def cut_while_saving(disk: Path) -> None:
    """An attempt that has died in its last save: an event torn, temporary files, objects that nobody needs."""
    calls = calls_of(SCENES["one rank"], None, disk)
    saving = [call for call in calls if call.name == "write" and call.path == "run/events.jsonl"][-2]
    shutil.rmtree(disk)
    ended = killed(SCENES["one rank"], disk, saving, "half")
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


def of_few(call: Call) -> bool:
    """Objects' files are many and all alike: of each of their calls one thing is tried, in turn."""
    return "/objects/" not in call.path + call.target and "tmp/object" not in call.path


def killed(scene: Scene, disk: Path, point: Call, moment: str) -> trainings.Ended:
    """A training whose victim dies at that call: before it, after it, or when a write is half done."""

    def decide(call: Call) -> Do:
        if call.key == point.key:
            done = 0 if call.name == "fsync" and moment == "after" else None
            return Do(kill="before" if moment == "before" else "after", answer=done,
                      most=call.count // 2 if moment == "half" else None)  # fmt: skip
        return only_fsync(call)

    return trainings.attempt(disk, scene.ranks, decide, traced=(scene.victim,))
