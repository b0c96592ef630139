"""The power goes at any call of a training: what was told as saved is there, and `nmoe train` comes to the same end.

The calls of a training are recorded, with what they write and with what the program takes for saved by then: a
checkpoint when its HEAD has been put, metrics when they have been flushed, an event when it has been added. They
are played to a disk that keeps only what it must (`tests.torture.lossy`); after each call it may be cut in four ways,
and every state that differs from all others becomes a disk on which the training goes on.

One kind of scene has a kill in it: what the killed attempt left is seen by the next, and may not be on the disk yet.
"""

import json
import os
import random
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import attrs

from nmoe.checkpoint.writer import CheckpointWriter
from nmoe.errors import RunError
from nmoe.metrics import ledger
from nmoe.metrics.sink import Sink
from nmoe.train import events
from tests.torture import lossy, trainings
from tests.torture.calls import Call
from tests.torture.campaign import Batch, Tally
from tests.torture.lossy import Disk, Tree
from tests.torture.scenes import PARTS, SCENES, batches_of, begun, only_fsync, sample_of
from tests.torture.trainings import Straight

TITLE = "power-loss states: after each system call what fsync promised, and any part of the rest / lost or another end"
SAMPLE = 150
OTHERS = 160
"""After a kill, every state with as little as the disk may keep, and every so manieth of the others."""
TOLD = "told"
"""A file beside the run, to which the ranks write what they take for saved; it is no part of the disk that is cut."""


WHOLE = list(SCENES)[:3]
"""Of two ranks all are recorded, whose calls are tried."""
KILLS = "a kill, and then the power"
ONE_KEPT = ("output.keep_checkpoints=1",)
"""So that a HEAD which is not certain yet would take the only checkpoint that is with it."""


@attrs.frozen(kw_only=True)
class Saved:
    """What has been told as saved: HEAD's step, the last step of the metrics, how many events.

    Metrics past the step that an attempt goes on from are no longer, once it sets them aside.
    """

    head: int = 0
    metrics: int = 0
    events: int = 0

    def and_then(self, line: str) -> "Saved":
        what, _, value = line.partition(" ")
        if what == "events":
            return attrs.evolve(self, events=self.events + 1)
        if what == "aside":
            return attrs.evolve(self, metrics=min(self.metrics, int(value)))
        return attrs.evolve(self, **{what: max(getattr(self, what), int(value))})


@attrs.frozen(kw_only=True)
class State:
    """A disk after a cut. how: what of it was kept; after: which call."""

    tree: Tree
    saved: Saved
    how: str
    after: str


def batches(sample: bool) -> list[Batch]:
    if sample:
        return sample_of(_batch, WHOLE[:2], SAMPLE)
    found = batches_of(_batch, WHOLE)
    return found + [Batch(f"{KILLS}, {part + 1}/{PARTS}", partial(_after_kills, part)) for part in range(PARTS)]


def _batch(name: str, part: int, parts: int, directory: Path) -> Tally:
    scene = SCENES[name]
    straight, start = begun(scene, directory)
    before = lossy.read(start)
    calls = record(start, scene.ranks)
    found = list(states(Disk(before), calls, Saved(), name))
    return tried(found[part::parts], scene.ranks, straight, directory)


def _after_kills(part: int, directory: Path) -> Tally:
    """Where something is seen that is not certain yet, the first attempt is killed, and the second's power is cut."""
    straight = trainings.begin(directory, *ONE_KEPT)
    first = record(directory / "first", 1, *ONE_KEPT)
    moments = [
        number
        for number, (call, result) in enumerate(first, 1)
        if result >= 0 and (call.name == "mkdir" or (call.name == "rename" and "/tmp/object" not in call.path))
        and "/objects/" not in call.path
    ]  # fmt: skip
    mine = moments[part::PARTS]
    total = Tally(tried=0)
    for number in mine:
        disk, saved = Disk({}), Saved()
        for call, result in first[:number]:
            saved = _play(disk, call, result, saved)
        second = directory / f"second{number}"
        lossy.write(disk.seen(), second)
        found = list(states(disk, record(second, 1, *ONE_KEPT), saved, f"killed after {first[number - 1][0].key}"))
        worst = [state for state in found if state.how in ("entries lost", "removals kept")]
        others = [state for state in found if state not in worst]
        one = tried(worst + others[number % OTHERS :: OTHERS], 1, straight, directory)
        total = Tally(tried=total.tried + one.tried, lost=total.lost + one.lost)
        shutil.rmtree(second)
    return total


def record(disk: Path, ranks: int, *sets: str) -> list[tuple[Call, int]]:
    """The calls of an attempt on `disk` with their results, in order; among them what is told as saved."""
    found: list[tuple[Call, int]] = []

    ended = trainings.attempt(
        disk, ranks, only_fsync, told=lambda call, result: found.append((call, result)), traced=range(ranks),
        prepare=partial(tell_what_is_saved, disk / TOLD), sets=sets,
    )  # fmt: skip
    assert ended.ends == ["exit 0"] * ranks, ended
    return found


def tell_what_is_saved(file: Path) -> None:
    """Makes this process write down what the program takes for saved, when it does."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    put, append = CheckpointWriter._put, events.append
    commit, flush, aside = Sink.commit, Sink.flush, Sink.set_aside_after
    committed = [0]

    def tell(line: str) -> None:
        os.write(descriptor, line.encode())

    def telling_put(self, path, content):
        put(self, path, content)
        if path.name == "HEAD":
            tell(f"head {json.loads(content)['step']}")

    def counting_commit(self, step, *given):
        commit(self, step, *given)
        committed.append(step)

    def telling_flush(self):
        last = committed[-1]
        flush(self)
        tell(f"metrics {last}")

    def telling_aside(self, step):
        tell(f"aside {step}")
        return aside(self, step)

    def telling_append(*given, **fields):
        append(*given, **fields)
        tell("events")

    CheckpointWriter._put, events.append = telling_put, telling_append
    Sink.commit, Sink.flush, Sink.set_aside_after = counting_commit, telling_flush, telling_aside


def _play(disk: Disk, call: Call, result: int, saved: Saved) -> Saved:
    if call.path != TOLD:
        disk.apply(call, result)
        return saved
    return saved.and_then(call.data.decode()) if call.name == "write" else saved


def states(disk: Disk, calls: list[tuple[Call, int]], saved: Saved, seed: str) -> Iterator[State]:
    """What a cut may leave after each of the calls; each state once for all that is told as saved by then."""
    seen: set[tuple] = set()
    for number, (call, result) in enumerate(calls):
        saved = _play(disk, call, result, saved)
        draw = random.Random(f"{seed} {number}")
        cuts = {kept: disk.cut(kept) for kept in lossy.KEPT} | {"drawn": disk.drawn(draw)}
        for how, tree in cuts.items():
            key = (lossy.frozen(tree), attrs.astuple(saved))
            if key not in seen:
                seen.add(key)
                yield State(tree=tree, saved=saved, how=how, after=f"{number} {call.key}")


def tried(found: list[State], ranks: int, straight: Straight, directory: Path) -> Tally:
    lost = []
    for state in found:
        disk = directory / "cut"
        lossy.write(state.tree, disk)
        wrong = missing(disk, state.saved) or trainings.going_on(disk, straight, ranks)
        if wrong:
            lost.append(f"{state.how} after {state.after}: {wrong}")
        shutil.rmtree(disk)
    return Tally(tried=len(found), lost=tuple(lost))


def missing(disk: Path, saved: Saved) -> str:
    """What was told as saved and is not there, or is damaged, if anything is."""
    head, faults = trainings.whole(disk)
    if faults or head < saved.head:
        return faults or f"HEAD names step {head}, and step {saved.head} was told as saved"
    try:
        for step in range(1, saved.metrics + 1):
            ledger.read(disk / "metrics" / "run" / ledger.file_name(step), step=step, run="run")
    except RunError as error:
        return str(error)
    if saved.events and len(events.read(disk / "run").events) < saved.events:
        return f"of {saved.events} events that were added there are fewer"
    return ""
