"""Kills and power cuts at every system call of a save: HEAD names a whole checkpoint, old or new.

The writer by itself, at all of its calls; `tests.torture` does the same to whole trainings. A kill is real. A power cut
is played: the calls of a save are recorded, and after each the disk is rebuilt as the least friendly file system may
leave it, with only what fsync promised.
"""

import contextlib
import os
import shutil

import pytest

from nmoe.checkpoint import disk
from nmoe.checkpoint import format as layout
from nmoe.checkpoint.verify import read_head, read_manifest, verify
from nmoe.checkpoint.writer import CheckpointWriter
from nmoe.rdep.control import Control
from tests.torture import lossy, tracer
from tests.torture.tracer import MADE, Do

FSYNC = os.fsync  # the other tests here do without it


def saving(directory, tool, step):
    """What a child does that saves one step."""

    def body():
        os.fsync = FSYNC
        tool.save(directory, step, keep=2, few=True)
        return 0

    return body


def only_fsync(call):
    return Do(answer=0) if call.name == "fsync" else MADE


def calls_of_saving(directory, tool, step):
    """The calls of a save in their order, each with its result."""
    found = []
    ends = tracer.run([saving(directory, tool, step)], directory, only_fsync, told=lambda *one: found.append(one))
    assert ends == ["exit 0"]
    return found


@pytest.mark.parametrize(("saved_before", "moment"), [((), "after"), ((1, 2), "before"), ((1, 2), "after")])
def test_a_kill_at_any_call_leaves_the_old_checkpoint_or_the_new(tmp_path, tool, moment, saved_before):
    start = tmp_path / "start" / "checkpoints"
    if saved_before:
        tool.save(start, *saved_before, keep=2, few=True)
    else:
        start.mkdir(parents=True)
    whole = tmp_path / "whole" / "checkpoints"
    shutil.copytree(start, whole)
    outcomes = []
    for call, _ in calls_of_saving(whole, tool, 3):
        directory = tmp_path / "killed" / "checkpoints"
        shutil.copytree(start, directory)
        half = call.count // 2 if call.name == "write" else None

        def kill(one, key=call.key, half=half):
            return only_fsync(one) if one.key != key else Do(kill=moment, most=half)

        assert tracer.run([saving(directory, tool, 3)], directory, kill) == ["signal 9"]
        report = verify(directory, threads=1)
        assert not report.faults, (call.key, report.faults)
        head = 0 if report.head is None else report.head.step
        assert head in (max(saved_before, default=0), 3)
        assert tool.holds(directory, head)
        outcomes.append(head)
        # The next attempt goes on, and leaves nothing of the cut save behind.
        tool.save(directory, 4, keep=2, few=True)
        assert tool.holds(directory, 4)
        assert not verify(directory, threads=1).notes
        shutil.rmtree(directory.parent)
    assert len(outcomes) > 25
    assert outcomes == sorted(outcomes), "HEAD went back"
    assert set(outcomes) == {max(saved_before, default=0), 3}


@pytest.mark.parametrize("kept", lossy.KEPT)
@pytest.mark.parametrize("saved_before", [(), (1, 2)])
def test_a_power_cut_at_any_call_leaves_the_old_checkpoint_or_the_new(tmp_path, tool, kept, saved_before):
    directory = tmp_path / "checkpoints"
    if saved_before:
        tool.save(directory, *saved_before, keep=2, few=True)
    else:
        directory.mkdir()
    played = lossy.Disk(lossy.read(directory))
    calls = calls_of_saving(directory, tool, 3)
    assert {call.name for call, _ in calls} >= {"open", "write", "fsync", "rename", "mkdir"}
    outcomes = []
    for call, result in calls:
        played.apply(call, result)
        cut = tmp_path / "cut"
        lossy.write(played.cut(kept), cut)
        report = verify(cut, threads=1)
        assert not report.faults, (call.key, report.faults)
        outcomes.append(0 if report.head is None else report.head.step)
        shutil.rmtree(cut)
    assert played.seen() == lossy.read(directory), "what was played is not what happened"
    assert set(outcomes) == {max(saved_before, default=0), 3}
    assert outcomes == sorted(outcomes)
    assert outcomes[-1] == 3, "save returned before HEAD was durable"


@pytest.mark.parametrize(("forgotten", "kept"), [("tmp/object", "entries kept"), ("objects/", "entries lost")])
def test_the_played_power_cut_can_tell_a_missing_fsync(tmp_path, tool, forgotten, kept):
    directory = tmp_path / "checkpoints"
    tool.save(directory, 1, keep=2)
    played = lossy.Disk(lossy.read(directory))
    there = {str(path.relative_to(directory)) for path in directory.rglob("*")}
    calls = calls_of_saving(directory, tool, 2)
    renamed = {call.target for call, _ in calls if call.name == "rename"}
    new = {target.rpartition("/")[0] for target in renamed - there}
    synced = [one for one in calls if one[0].name == "fsync" and one[0].path.startswith(forgotten)]
    missing = next(one for one in synced if one[0].path in new or kept == "entries kept")
    for call, result in calls:
        if (call, result) != missing:
            played.apply(call, result)
    lossy.write(played.cut(kept), tmp_path / "cut")
    assert verify(tmp_path / "cut", threads=1).faults


def test_what_a_killed_process_made_is_made_durable_by_the_next(tmp_path):
    """Killed between mkdir and the fsync of its parent, a run would else be gone after a power cut, saved or not."""
    run = tmp_path / "runs" / "run"
    made = []
    for kill in ("before", ""):

        def decide(call, kill=kill):
            made.append(call)
            return Do(kill=kill) if kill and call.name == "fsync" and call.path == "runs" else only_fsync(call)

        def body():
            os.fsync = FSYNC
            disk.make_directory(run)
            return 0

        assert tracer.run([body], tmp_path, decide) == ["signal 9" if kill else "exit 0"]
    assert [call.path for call in made if call.name == "mkdir"] == ["runs", "runs/run"]
    assert (made[-1].name, made[-1].path) == ("fsync", "runs")


def test_a_reader_beside_a_running_save_sees_one_or_the_other(tmp_path, tool):
    """verify is called between any two calls of a save by the same process: as another process might."""
    directory = tmp_path / "checkpoints"
    tool.save(directory, 1, 2, keep=2)
    seen = []
    with contextlib.ExitStack() as stack:
        for name in ("rename", "unlink", "rmdir"):
            stack.enter_context(pytest.MonkeyPatch.context()).setattr(os, name, _looking(name, directory, seen))
        tool.save(directory, 3, keep=2)
    assert set(seen) == {2, 3}
    assert read_manifest(directory, read_head(directory).step)[0].parent.step == 2
    assert layout.steps_on_disk(directory) == [2, 3]
    assert CheckpointWriter(directory, keep=2, control=Control.alone()).removed == ()


def _looking(name, directory, seen):
    real = getattr(os, name)

    def call(*arguments, **named):
        result = real(*arguments, **named)
        report = verify(directory, threads=1)
        assert not report.faults, report.faults
        seen.append(report.head.step)
        return result

    return call
