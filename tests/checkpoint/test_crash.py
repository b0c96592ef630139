"""Kills and power cuts at every system call of a save: HEAD names a whole checkpoint, old or new.

A kill is real: a forked child saves and sends itself SIGKILL at its n-th call, before it, after it, or
(a write) half way through. A power cut is played: every call of a save is recorded, and for each
prefix the disk is rebuilt as the least friendly file system may leave it, with only what fsync promised.
"""

import contextlib
import os
import shutil
import signal
from pathlib import Path

import pytest

from nmoe.checkpoint import format as layout
from nmoe.checkpoint.verify import read_head, read_manifest, verify
from nmoe.checkpoint.writer import CheckpointWriter
from nmoe.rdep.control import Control

CALLS = ("write", "fsync", "rename", "mkdir", "unlink", "rmdir")


def save_in_child(directory, tool, step, kill_at, moment):
    """Forks; True if the child was killed, False if it had fewer calls than that and finished."""
    child = os.fork()
    if child == 0:
        try:
            count = iter(range(10**6))

            def hooked(name, real):
                def call(*arguments, **named):
                    hit = next(count) == kill_at
                    if hit and moment == "before":
                        os.kill(os.getpid(), signal.SIGKILL)
                    if hit and name == "write":
                        arguments = (arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                    try:
                        return real(*arguments, **named)
                    finally:
                        if hit:
                            os.kill(os.getpid(), signal.SIGKILL)

                return call

            for name in CALLS:
                setattr(os, name, hooked(name, getattr(os, name)))
            tool.save(directory, step, keep=2, few=True)
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


@pytest.mark.parametrize(("saved_before", "moment"), [((), "after"), ((1, 2), "before"), ((1, 2), "after")])
def test_a_kill_at_any_call_leaves_the_old_checkpoint_or_the_new(tmp_path, tool, moment, saved_before):
    start = tmp_path / "start" / "checkpoints"
    if saved_before:
        tool.save(start, *saved_before, keep=2, few=True)
    else:
        start.mkdir(parents=True)
    outcomes = []
    for kill_at in range(10**6):
        directory = tmp_path / f"at{kill_at}" / "checkpoints"
        shutil.copytree(start, directory)
        killed = save_in_child(directory, tool, 3, kill_at, moment)
        report = verify(directory, threads=1)
        assert not report.faults, (kill_at, report.faults)
        head = 0 if report.head is None else report.head.step
        assert head in (max(saved_before, default=0), 3)
        assert tool.holds(directory, head)
        outcomes.append(head)
        # The next attempt goes on, and leaves nothing of the cut save behind.
        tool.save(directory, 4, keep=2, few=True)
        assert tool.holds(directory, 4)
        assert not verify(directory, threads=1).notes
        shutil.rmtree(directory.parent)
        if not killed:
            break
    assert len(outcomes) > 25
    assert outcomes == sorted(outcomes), "HEAD went back"
    assert set(outcomes) == {max(saved_before, default=0), 3}


class RecordedDisk:
    """Records what is done to the files below `root`, in order, by path."""

    def __init__(self, root: Path):
        self.root = root
        self.log: list[tuple] = []
        self.paths: dict[int, str] = {}

    def patch(self, patched: pytest.MonkeyPatch) -> None:
        real = {name: getattr(os, name) for name in (*CALLS, "open")}

        def place(path, dir_fd=None):
            return os.fspath(path) if dir_fd is None else f"{self.paths[dir_fd]}/{os.fspath(path)}"

        def open_(path, flags, mode=0o777, *, dir_fd=None):
            descriptor = real["open"](path, flags, mode, dir_fd=dir_fd)
            self.paths[descriptor] = place(path, dir_fd)
            if flags & os.O_CREAT:
                self.log.append(("create", place(path, dir_fd)))
            return descriptor

        def write(descriptor, data):
            self.log.append(("write", self.paths[descriptor], bytes(data)))
            return real["write"](descriptor, data)

        def fsync(descriptor):
            self.log.append(("fsync", self.paths[descriptor]))

        def rename(source, target):
            real["rename"](source, target)
            self.log.append(("rename", os.fspath(source), os.fspath(target)))

        def one_path(name):
            def call(path, *rest, dir_fd=None):
                real[name](path, *rest, dir_fd=dir_fd)
                self.log.append((name, place(path, dir_fd)))

            return call

        for name, function in {"open": open_, "write": write, "fsync": fsync, "rename": rename}.items():
            patched.setattr(os, name, function)
        for name in ("mkdir", "unlink", "rmdir"):
            patched.setattr(os, name, one_path(name))


class Node:
    """A file or directory twice: as the running system sees it, and as the disk has it for certain."""

    def __init__(self, path: Path | None = None):
        self.is_directory = path is None or path.is_dir()
        self.now: dict[str, Node] | bytes = b""
        if self.is_directory:
            self.now = {} if path is None else {entry.name: Node(entry) for entry in path.iterdir()}
        elif path is not None:
            self.now = path.read_bytes()
        self.durable = dict(self.now) if self.is_directory else self.now

    def sync(self):
        self.durable = dict(self.now) if self.is_directory else self.now


def after_power_cut(start: Path, log: list[tuple], mode: str) -> Node:
    """The tree of `start` after the calls of `log`, of which the disk kept only what it must.

    mode "entries lost": a name appears, moves or goes only with its directory's fsync. "entries
    kept": every name change is on the disk at once, content that was not synced is not. "removals
    kept": as the first, with removals on the disk at once.
    """
    root = Node(start)

    def find(path):
        node = root
        for part in Path(path).relative_to(start).parts:
            node = node.now[part]
        return node

    def changed(folder, name, node, is_removal=False):
        if node is None:
            folder.now.pop(name)
        else:
            folder.now[name] = node
        if mode == "entries kept" or (mode == "removals kept" and is_removal):
            if node is None:
                folder.durable.pop(name, None)
            else:
                folder.durable[name] = node

    for what, path, *rest in log:
        folder, name = (find(Path(path).parent), Path(path).name) if path != str(start) else (None, "")
        if what == "create" and name not in folder.now:
            node = Node()
            node.is_directory, node.now, node.durable = False, b"", b""
            changed(folder, name, node)
        elif what == "create":
            folder.now[name].now = b""
        elif what == "write":
            folder.now[name].now += rest[0]
        elif what == "fsync":
            find(path).sync()
        elif what == "mkdir":
            changed(folder, name, Node())
        elif what == "rename":
            node = folder.now[name]
            changed(folder, name, None)
            changed(find(Path(rest[0]).parent), Path(rest[0]).name, node)
        else:
            changed(folder, name, None, is_removal=True)
    return root


def materialise(node: Node, path: Path) -> None:
    if node.is_directory:
        path.mkdir()
        for name, child in node.durable.items():
            materialise(child, path / name)
    else:
        path.write_bytes(node.durable)


@pytest.mark.parametrize("mode", ["entries lost", "entries kept", "removals kept"])
@pytest.mark.parametrize("saved_before", [(), (1, 2)])
def test_a_power_cut_at_any_call_leaves_the_old_checkpoint_or_the_new(tmp_path, tool, monkeypatch, mode, saved_before):
    directory = tmp_path / "checkpoints"
    if saved_before:
        tool.save(directory, *saved_before, keep=2, few=True)
    else:
        directory.mkdir()
    start = tmp_path / "start"
    shutil.copytree(directory, start)
    recorded = RecordedDisk(directory)
    with monkeypatch.context() as patched:
        recorded.patch(patched)
        tool.save(directory, 3, keep=2, few=True)
    log = [
        tuple(part.replace(str(directory), str(start)) if isinstance(part, str) else part for part in call)
        for call in recorded.log
    ]
    assert {call[0] for call in log} >= {"create", "write", "fsync", "rename", "mkdir"}
    outcomes = []
    for length in range(len(log) + 1):
        cut = tmp_path / "cut"
        materialise(after_power_cut(start, log[:length], mode), cut)
        report = verify(cut, threads=1)
        assert not report.faults, (length, log[length - 1][:2], report.faults)
        outcomes.append(0 if report.head is None else report.head.step)
        shutil.rmtree(cut)
    assert set(outcomes) == {max(saved_before, default=0), 3}
    assert outcomes == sorted(outcomes)
    assert outcomes[-1] == 3, "save returned before HEAD was durable"


@pytest.mark.parametrize("forgotten", ["file", "directory"])
def test_the_played_power_cut_can_tell_a_missing_fsync(tmp_path, tool, monkeypatch, forgotten):
    start = tmp_path / "start"
    directory = tmp_path / "checkpoints"
    tool.save(directory, 1, keep=2)
    shutil.copytree(directory, start)
    recorded = RecordedDisk(directory)
    with monkeypatch.context() as patched:
        recorded.patch(patched)
        tool.save(directory, 2, keep=2)
    log = [
        tuple(part.replace(str(directory), str(start)) if isinstance(part, str) else part for part in call)
        for call in recorded.log
    ]
    objects = [call for call in log if call[0] == "fsync" and ("tmp/object" in call[1]) == (forgotten == "file")]
    objects = [call for call in objects if "object" in call[1]]
    log.remove(objects[0])
    mode = "entries kept" if forgotten == "file" else "entries lost"
    materialise(after_power_cut(start, log, mode), tmp_path / "cut")
    assert verify(tmp_path / "cut", threads=1).faults


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
