"""What a person sees of a run, on a terminal and elsewhere."""

import fcntl
import io
import os
import pty
import re
import struct
import termios
import time

import pytest

from nmoe.metrics.throughput import Throughput
from nmoe.train.progress import Progress, count, duration, finish


def rate(tokens_per_second: float) -> Throughput:
    throughput = Throughput()
    for _ in range(3):
        throughput.step(int(tokens_per_second), 1.0)
    return throughput


def on_terminal(columns: int, act) -> str:
    """All that `act(progress)` writes to a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(theirs, "w") as stream:
        act(Progress(total_steps=20, total_tokens=20_000, every=10, stream=stream))
    with os.fdopen(ours, "rb", buffering=0) as reader:
        text = b""
        try:
            while part := reader.read(4096):
                text += part
        except OSError:  # a terminal's other end has closed
            pass
    return text.decode()


def three_steps(progress: Progress) -> None:
    progress.say("starting")
    for step in (1, 2, 3):
        progress.step(step, 1000 * step, 5.25, 2.5, rate(1000))
    progress.close()


@pytest.mark.parametrize("columns", [40, 200])
def test_a_terminal_shows_one_line_that_never_wraps(columns, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    text = on_terminal(columns, three_steps)
    assert text.startswith("starting\r\n")
    shown = text.removeprefix("starting\r\n").split("\r\x1b[2K")[1:]
    assert [re.match(r"step  (\d)/20", line)[1] for line in shown] == ["1", "2", "3"]
    assert max(len(line.rstrip("\r\n")) for line in shown) < columns
    assert all("loss 5.2500" in line for line in shown), "what matters most is what a narrow one shows"
    assert shown[-1].endswith("\r\n"), "the last line stays"


def test_a_dumb_terminal_and_a_file_get_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    plain = on_terminal(80, three_steps)
    stream = io.StringIO()
    three_steps(Progress(total_steps=20, total_tokens=20_000, every=3, stream=stream))
    assert "\x1b" not in plain + stream.getvalue()
    assert [line.split()[1] for line in stream.getvalue().splitlines()[1:]] == ["1/20", "3/20"]


def test_a_finish_beyond_a_day_says_which_day():
    assert re.fullmatch(r"\d\d:\d\d:\d\d", finish(86399))
    far = time.strptime(finish(10 * 86400), "%Y-%m-%d %H:%M")
    assert 10 * 86400 - 60 <= time.mktime(far) - time.time() <= 10 * 86400 + 3600


def test_counts_and_spans_read_as_people_write_them():
    assert [count(v) for v in (7, 999, 1000, 10_400, 980_000, 2_457_600, 3.2e9, 5e13)] == [
        "7", "999", "1.00k", "10.4k", "980k", "2.46M", "3.20B", "50.00T",
    ]  # fmt: skip
    assert [duration(v) for v in (0.2, 59.4, 59.6, 192, 7500, 367_200)] == [
        "0s", "59s", "1m00s", "3m12s", "2h05m", "4d06h",
    ]  # fmt: skip
