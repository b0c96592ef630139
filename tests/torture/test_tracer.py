"""The tracer against what a process finds of its own calls, and what it finds on the disk after it has died."""

import errno
import os
import threading

import pytest

from tests.torture import tracer
from tests.torture.tracer import MADE, Do, NotPermitted


def writer(directory, said):
    """Three threads write a file each and rename it; what write and fsync came to, a line each, on the disk beside."""

    def one(name):
        descriptor = os.open(directory / name, os.O_WRONLY | os.O_CREAT)
        for call in (lambda: os.write(descriptor, b"0123456789"), lambda: os.fsync(descriptor)):
            try:
                found = call()
            except OSError as error:
                found = errno.errorcode[error.errno]
            with said.open("a") as file:
                file.write(f"{name} {found}\n")
        os.close(descriptor)
        (directory / name).rename(directory / f"{name}.done")

    def body():
        threads = [threading.Thread(target=one, args=(name,)) for name in "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return 7

    return body


def test_calls_are_seen_refused_and_cut_short_in_every_thread(tmp_path):
    directory, said = tmp_path / "disk", tmp_path / "said"
    directory.mkdir()
    seen = []
    answers = {"write b": Do(answer=-errno.ENOSPC), "write c": Do(most=4), "fsync a": Do(answer=-errno.EIO)}
    ends = tracer.run(
        [writer(directory, said)], directory,
        lambda call: answers.get(f"{call.name} {call.path}", MADE), told=lambda *one: seen.append(one),
    )  # fmt: skip
    assert ends == ["exit 7"]
    assert sorted(said.read_text().splitlines()) == ["a 10", "a EIO", "b ENOSPC", "b None", "c 4", "c None"]
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == {
        "a.done": b"0123456789", "b.done": b"", "c.done": b"0123",
    }  # fmt: skip
    for name in "abc":
        mine = [call for call, _ in seen if call.path == name]
        assert [call.name for call in mine] == ["open", "write", "fsync", "close", "rename"]
        assert (mine[1].data, mine[1].offset, mine[4].target) == (b"0123456789", 0, f"{name}.done")
    assert {call.path: result for call, result in seen if call.name == "write"} == {"a": 10, "b": -errno.ENOSPC, "c": 4}


@pytest.mark.parametrize(("kill", "most", "content"), [("before", None, b""), ("after", None, b"0123456789"),
                                                       ("after", 5, b"01234")])  # fmt: skip
def test_a_process_dies_before_after_and_in_the_middle_of_a_call(tmp_path, kill, most, content):
    directory = tmp_path / "disk"
    directory.mkdir()

    def decide(call):
        return Do(kill=kill, most=most) if (call.name, call.path, call.time) == ("write", "b", 0) else MADE

    assert tracer.run([writer(directory, tmp_path / "said")], directory, decide) == ["signal 9"]
    assert (directory / "b").read_bytes() == content


def test_of_two_processes_one_is_asked_about_and_both_are_waited_for(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    bodies = [writer(tmp_path / name, tmp_path / "said") for name in ("one", "two")]
    seen = []
    assert tracer.run(bodies, tmp_path, lambda call: seen.append(call) or MADE, traced=(1,)) == ["exit 7", "exit 7"]
    assert {call.path.partition("/")[0] for call in seen} == {"two", "said"}
    assert {call.rank for call in seen} == {1}


def test_a_process_that_never_ends_is_ended(tmp_path):
    assert tracer.run([lambda: threading.Event().wait() or 0], tmp_path, lambda call: MADE, limit_s=0.1) == ["signal 9"]


def test_who_may_not_trace_is_told(tmp_path):
    """What is traced itself has a tracer already, and cannot ask for another one."""

    def body():
        try:
            tracer.run([lambda: 0], tmp_path, lambda call: MADE)
        except NotPermitted as error:
            (tmp_path / "said").write_text(str(error))
        return 0

    assert tracer.run([body], tmp_path, lambda call: MADE) == ["exit 0"]
    assert "allow ptrace (in a container, --cap-add=SYS_PTRACE" in (tmp_path / "said").read_text()
