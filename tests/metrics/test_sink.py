"""The ledger on disk: read back by two other readers, whole after any kill, loud about any damage."""

import errno
import hashlib
import os
import subprocess
import sys

import duckdb
import pyarrow.parquet as pq
import pytest

from nmoe.errors import RunError
from nmoe.metrics import ledger, reader, sink
from tests.metrics.ledgers import expected, fill, opened


def test_read_back_by_arrow_by_duckdb_and_by_the_reader(tmp_path):
    with opened(tmp_path) as into:
        for step in (1, 2, 5, 123456789):
            fill(into, step)
    directory = tmp_path / "moonlet"
    assert sorted(p.name for p in directory.iterdir()) == [
        "step_00000001.parquet", "step_00000002.parquet", "step_00000005.parquet", "step_123456789.parquet",
    ]  # fmt: skip
    for step in (1, 2, 5, 123456789):
        path = directory / ledger.file_name(step)
        table = pq.read_table(path, page_checksum_verification=True)
        assert table.schema.equals(ledger.COLUMNS)
        assert [tuple(row.values()) for row in table.to_pylist()] == expected(step)
        assert duckdb.sql(f"from '{path}'").fetchall() == expected(step)
    rows = reader.read_rows(directory)
    assert [tuple(getattr(row, f.name) for f in ledger.COLUMNS) for row in rows] == [
        row for step in (1, 2, 5, 123456789) for row in expected(step)
    ]
    assert [(r.step, r.value) for r in reader.read_rows(directory, names=["train/loss"])] == [
        (s, 1.0 / 3.0 + s) for s in (1, 2, 5, 123456789)
    ]
    assert reader.last_value(directory, "router/expert_load") == 123456789.0
    assert reader.last_value(directory, "grad/group_norm", label="dense") == 2.5
    assert reader.last_value(directory, "grad/group_norm", label="experts") is None
    assert reader.read_rows(tmp_path / "nobody") == []
    assert ledger.verify(directory) == 4


def test_one_query_reads_all_runs_and_follows_the_files(tmp_path):
    with pytest.raises(RunError, match="N0409"):
        reader.connect(tmp_path)
    with opened(tmp_path, run="a") as a, opened(tmp_path, run="b's") as b:
        fill(a, 1)
        fill(b, 1)
        a.flush()
        b.flush()
        connection = reader.connect(tmp_path)
        query = "select run, count(distinct step) from metrics group by run order by run"
        assert connection.sql(query).fetchall() == [("a", 1), ("b's", 1)]
        fill(a, 2)
        a.flush()
        assert connection.sql(query).fetchall() == [("a", 2), ("b's", 1)]


def test_a_resume_sets_aside_what_lies_past_it(tmp_path):
    with opened(tmp_path) as into:
        for step in range(1, 6):
            fill(into, step)
    (tmp_path / "moonlet" / ".step_00000006.parquet.tmp").write_bytes(b"half a st")
    (tmp_path / "moonlet" / "notes.txt").write_text("mine")
    with opened(tmp_path, attempt=2) as into:
        assert into.last_step == 5
        assert into.set_aside_after(3) == 2
        assert into.last_step == 3
        fill(into, 4)
        fill(into, 5)
    directory = tmp_path / "moonlet"
    assert sorted(p.name for p in directory.iterdir()) == [
        "notes.txt", *(ledger.file_name(s) for s in range(1, 6)), "superseded",
    ]  # fmt: skip
    assert [(r.step, r.attempt) for r in reader.read_rows(directory, names=["train/loss"])] == [
        (1, 1), (2, 1), (3, 1), (4, 2), (5, 2),
    ]  # fmt: skip
    aside = directory / "superseded" / "attempt_1"
    assert sorted(p.name for p in aside.iterdir()) == [ledger.file_name(4), ledger.file_name(5)]
    assert pq.read_table(aside / ledger.file_name(4)).to_pylist()[0]["attempt"] == 1
    # An attempt's number that comes twice loses nothing either.
    with opened(tmp_path, attempt=2) as into:
        into.set_aside_after(3)
        fill(into, 4)
    with opened(tmp_path, attempt=3) as into:
        assert into.set_aside_after(0) == 4
    names = sorted(str(p.relative_to(directory / "superseded")) for p in directory.glob("superseded/*/*"))
    assert names == [
        *(f"attempt_1/{ledger.file_name(s)}" for s in range(1, 6)),
        f"attempt_2.1/{ledger.file_name(4)}",
        *(f"attempt_2/{ledger.file_name(s)}" for s in (4, 5)),
    ]
    assert reader.read_rows(directory) == []


def test_refusals(tmp_path):
    into = opened(tmp_path)
    fill(into, 2)
    with pytest.raises(RunError, match=r"N0404.*has no rows"):
        into.commit(3, 1, 1)
    into.add("train/loss", 1.0)
    for step in (1, 2):
        with pytest.raises(RunError, match=r"N0404.*after step 2"):
            into.commit(step, 1, 1)
    with pytest.raises(RunError, match=r"N0404.*`train/loss` was added twice"):
        into.add("train/loss", 2.0)
    with pytest.raises(RunError, match="N0401"):
        into.add("train/speed", 2.0)
    with pytest.raises(RunError, match=r"N0404.*1 rows were added and never committed"):
        into.close()
    for run in ("", "a/b", ".hidden"):
        with pytest.raises(RunError, match="N0408"):
            opened(tmp_path, run=run)
    # A step that another writer has put there meanwhile is not overwritten.
    first, second = opened(tmp_path), opened(tmp_path)
    fill(first, 3)
    first.close()
    before = (tmp_path / "moonlet" / ledger.file_name(3)).read_bytes()
    second.add("train/loss", 9.0)
    second.commit(3, 1, 1)
    with pytest.raises(RunError, match=r"N0402.*file exists"):
        second.close()
    assert (tmp_path / "moonlet" / ledger.file_name(3)).read_bytes() == before


def test_a_full_disk_is_reported_and_leaves_whole_steps(tmp_path, monkeypatch):
    into = opened(tmp_path)
    fill(into, 1)
    into.flush()

    def full(descriptor, data):
        os.pwrite(descriptor, bytes(data[:100]), 0)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(ledger.os, "write", full)
        fill(into, 2)
        with pytest.raises(RunError, match=r"N0402.*no space left on device(.|\n)*step_00000002"):
            into.flush()
    for again in (lambda: fill(into, 3), into.flush, into.close):
        with pytest.raises(RunError, match="N0402"):
            again()
    assert list(ledger.files(tmp_path / "moonlet")) == [1]
    with opened(tmp_path, attempt=2) as into:
        assert into.last_step == 1
        fill(into, 2)
    assert ledger.verify(tmp_path / "moonlet") == 2


def test_a_failure_of_the_disk_joins_the_failure_of_the_training(tmp_path, monkeypatch):
    def broken(path, content):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(ledger, "write", broken)
    with pytest.raises(ValueError, match="the training") as caught, opened(tmp_path) as into:
        fill(into, 1)
        raise ValueError("the training failed")
    assert "input/output error" in caught.value.__notes__[0]


def test_the_training_waits_when_the_queue_is_full_and_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sink, "QUEUE", 1)
    with opened(tmp_path) as into:
        for step in range(1, 8):
            fill(into, step)
        into.flush()
        assert list(ledger.files(tmp_path / "moonlet")) == list(range(1, 8))


KILLED = """
import os, signal, sys
from pathlib import Path
import pandas, pyarrow.parquet
from nmoe.metrics import ledger
from nmoe.metrics.sink import Sink

# Each round: a child goes on from two steps before the last, committing without end. It announces each
# commit, each flush and each 300 bytes that it has written, and is killed at its n-th announcement.
write = os.write


def in_pieces(descriptor, data):
    count = write(descriptor, data[:300])
    write(into, b"w")
    return count


directory = Path(sys.argv[1])
for attempt in range(1, int(sys.argv[2]) + 1):
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)
        ledger.os.write = in_pieces
        sink = Sink(directory, run="r", lineage="line", attempt=attempt)
        sink.set_aside_after(max(sink.last_step - 2, 0))
        step = sink.last_step
        while True:
            step += 1
            for layer in range(20):
                sink.add("router/entropy", step + layer / 100, layer=layer)
            sink.commit(step, step, step)
            write(into, b".")
            if step % 3 == 0:
                sink.flush()
                write(into, b"f")
    os.close(into)
    wanted, seen = 30 + attempt * 17 % 41, b""
    while len(seen) < wanted:
        got = os.read(out, 1)
        if not got:
            sys.exit(f"attempt {attempt} ended by itself")
        seen += got
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), status
    os.close(out)
"""


def test_kill_at_any_time_leaves_whole_steps(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), "24"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    directory = tmp_path / "r"
    count = ledger.verify(directory)
    assert list(ledger.files(directory)) == list(range(1, count + 1)), "a hole"
    attempts = []
    for step, path in ledger.files(directory).items():
        table = ledger.read(path, step=step, run="r")
        assert table.column("value").to_pylist() == [step + layer / 100 for layer in range(20)]
        attempts.append(table.column("attempt")[0].as_py())
    assert attempts == sorted(attempts) and attempts[-1] == 24
    for path in directory.glob("superseded/*/*.parquet"):
        step = int(path.stem.removeprefix("step_"))
        table = ledger.read(path, step=step, run="r")
        assert table.num_rows == 20
        assert {f"attempt_{a}" for a in table.column("attempt").to_pylist()} == {path.parent.name}
    assert len(list(directory.glob("superseded/*"))) > 10


def test_a_directory_that_a_killed_process_made_is_made_durable(tmp_path, monkeypatch):
    """Killed between mkdir and the fsync of the parent, it would else go with a power cut, and all its rows."""
    (tmp_path / "metrics" / "moonlet").mkdir(parents=True)
    synced = []
    monkeypatch.setattr(ledger, "sync", synced.append)
    opened(tmp_path / "metrics").close()
    assert synced == [tmp_path / "metrics"]
    opened(tmp_path / "metrics", run="another").close()
    assert synced[1:] == [tmp_path, tmp_path / "metrics"]


def test_metrics_do_not_depend_on_when_they_are_written(tmp_path):
    """The same rows give the same bytes, so a ledger can be compared by digest."""
    digests = set()
    for name in ("a", "b"):
        with opened(tmp_path / name) as into:
            fill(into, 1)
        digests.add(hashlib.sha256((tmp_path / name / "moonlet" / ledger.file_name(1)).read_bytes()).hexdigest())
    assert len(digests) == 1
