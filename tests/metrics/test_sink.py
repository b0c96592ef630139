"""The ledger on disk: read back by two other readers, whole after any kill, loud about any damage."""

import errno
import hashlib
import os
import subprocess
import sys

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nmoe.errors import RunError
from nmoe.metrics import ledger, reader, sink
from nmoe.metrics.sink import Sink


def opened(directory, attempt=1, run="moonlet"):
    return Sink(directory, run=run, lineage="line-1", attempt=attempt)


def fill(into, step):
    into.add("train/loss", 1.0 / 3.0 + step)
    for layer in (0, 3):
        into.add("router/entropy", 0.9 + layer, layer=layer)
        into.add("router/expert_load", float(step), layer=layer, expert=7)
    into.add("grad/group_norm", 2.5, label="dense")
    into.add("memory/resident", 2**40 + 1, rank=0)
    into.add("data/batch_digest", None, label=f"{step:064x}")
    into.commit(step, step * 1000, 1_700_000_000_000_000_000 + step)


def expected(step, attempt=1):
    head = ("moonlet", "line-1", attempt, step, step * 1000, 1_700_000_000_000_000_000 + step)
    return [
        (*head, "train/loss", None, None, None, None, 1.0 / 3.0 + step),
        (*head, "router/entropy", 0, None, None, None, 0.9),
        (*head, "router/expert_load", 0, 7, None, None, float(step)),
        (*head, "router/entropy", 3, None, None, None, 3.9),
        (*head, "router/expert_load", 3, 7, None, None, float(step)),
        (*head, "grad/group_norm", None, None, None, "dense", 2.5),
        (*head, "memory/resident", None, None, 0, None, 2.0**40 + 1),
        (*head, "data/batch_digest", None, None, None, f"{step:064x}", None),
    ]


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


def test_a_flipped_bit_is_found_or_harmless(tmp_path):
    """Arrow's checksums and the ledger's own checks together: no flip changes what is read."""
    with opened(tmp_path) as into:
        fill(into, 1)
    path = tmp_path / "moonlet" / ledger.file_name(1)
    whole = path.read_bytes()
    good = ledger.read(path, step=1, run="moonlet")
    in_pages = 0
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for place in range(0, len(whole), 3):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        try:
            table = ledger.read(path, step=1, run="moonlet")
        except RunError as error:
            assert error.diagnostics[0].code == "N0403"
            in_pages += place < footer
        else:
            assert table.equals(good), f"byte {place} changed what is read, in silence"
    assert in_pages * 3 / footer > 0.8
    path.write_bytes(whole[:-1])
    with pytest.raises(RunError, match="N0403"):
        ledger.verify(tmp_path / "moonlet")


def test_the_reader_names_the_file_that_it_cannot_read(tmp_path):
    with opened(tmp_path) as into:
        fill(into, 1)
        fill(into, 2)
    path = tmp_path / "moonlet" / ledger.file_name(2)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(RunError, match="N0403") as caught:
        reader.read_rows(tmp_path / "moonlet")
    assert caught.value.diagnostics[0].place == str(path)


def test_pages_really_carry_checksums(tmp_path):
    """A flip in the last page of the values: it is the checksum that finds it."""
    with opened(tmp_path) as into:
        fill(into, 1)
    path = tmp_path / "moonlet" / ledger.file_name(1)
    raw = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(0).column(11)
    start = column.dictionary_page_offset or column.data_page_offset
    raw[start + column.total_compressed_size - 3] ^= 0x40
    path.write_bytes(raw)
    with pytest.raises(OSError, match=r"(?i)crc"):
        pq.read_table(path, page_checksum_verification=True)
    with pytest.raises(RunError, match="N0403"):
        opened(tmp_path)


def test_a_file_under_another_name_is_damage(tmp_path):
    with opened(tmp_path) as into:
        fill(into, 1)
    directory = tmp_path / "moonlet"
    (directory / ledger.file_name(1)).rename(directory / ledger.file_name(2))
    with pytest.raises(RunError, match=r"N0403.*holds step 1 where its name says 2"):
        opened(tmp_path)
    (directory / ledger.file_name(2)).rename(directory / ledger.file_name(1))
    directory.rename(tmp_path / "other")
    with pytest.raises(RunError, match=r"N0403.*holds run moonlet where its name says other"):
        ledger.verify(tmp_path / "other")
    target = tmp_path / "moonlet2"
    target.mkdir()
    (target / ledger.file_name(1)).symlink_to(tmp_path / "other" / ledger.file_name(1))
    with pytest.raises(RunError, match=r"N0403.*not a regular file"):
        ledger.verify(target)


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


@pytest.mark.parametrize("odd", ["pipe", "hole", "link"])
def test_no_reader_waits_for_a_pipe_or_follows_a_link(tmp_path, odd):
    with opened(tmp_path) as into:
        fill(into, 1)
    path = tmp_path / "moonlet" / ledger.file_name(2)
    if odd == "pipe":
        os.mkfifo(path)
    elif odd == "link":
        path.symlink_to(tmp_path / "moonlet" / ledger.file_name(1))
    else:
        path.touch()
        os.truncate(path, 1 << 40)
    with pytest.raises(RunError, match="N0403"):
        ledger.read(path, step=2, run="moonlet")
    with pytest.raises(RunError, match="N0403"):
        reader.read_rows(tmp_path / "moonlet")


def rewritten(path, column, values):
    """Puts a whole file with other values in one column in its place."""
    table = pq.read_table(path)
    at = table.schema.get_field_index(column)
    pq.write_table(table.set_column(at, table.schema.field(column), values), path, write_page_checksum=True)


@pytest.mark.parametrize("column", ["name", "label", "lineage", "run"])
def test_text_that_is_no_utf8_is_damage(tmp_path, column):
    with opened(tmp_path) as into:
        fill(into, 1)
    path = tmp_path / "moonlet" / ledger.file_name(1)
    content = pa.array([b"\xc3("] * len(expected(1)), pa.binary())
    rewritten(path, column, pa.StringArray.from_buffers(len(content), *content.buffers()[1:]))
    with pytest.raises(RunError, match="N0403"):
        ledger.read(path, step=1, run="moonlet")


@pytest.mark.parametrize(
    ("column", "value", "what"),
    [
        ("lineage", "another", "2 values of lineage"), ("attempt", 7, "2 values of attempt"),
        ("tokens_seen", 5, "2 values of tokens_seen"), ("time_ns", 5, "2 values of time_ns"),
    ],
)  # fmt: skip
def test_rows_of_two_origins_are_damage(tmp_path, column, value, what):
    with opened(tmp_path) as into:
        fill(into, 1)
    path = tmp_path / "moonlet" / ledger.file_name(1)
    values = pq.read_table(path).column(column).to_pylist()
    rewritten(path, column, pa.array([*values[:-1], value], ledger.COLUMNS.field(column).type))
    with pytest.raises(RunError, match=f"N0403.*{what}"):
        ledger.read(path, step=1, run="moonlet")


def test_an_attempt_before_the_first_is_damage(tmp_path):
    with opened(tmp_path) as into:
        fill(into, 1)
    path = tmp_path / "moonlet" / ledger.file_name(1)
    rewritten(path, "attempt", pa.array([-1] * len(expected(1)), pa.int32()))
    with pytest.raises(RunError, match=r"N0403.*attempt -1"):
        ledger.read(path, step=1, run="moonlet")


def test_a_small_file_that_unpacks_to_more_than_a_step_may_have_is_damage(tmp_path, monkeypatch):
    """One text, named once in a dictionary and told a thousand times."""
    monkeypatch.setattr(ledger, "LARGEST", 1 << 20)
    with opened(tmp_path) as into:
        fill(into, 1)
    path = tmp_path / "moonlet" / ledger.file_name(1)
    row = pq.read_table(path).slice(0, 1)
    table = pa.concat_tables([row] * 1000)
    at = table.schema.get_field_index("label")
    long = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["a" * 4096]))
    field = pa.field("label", long.type)
    pq.write_table(table.set_column(at, field, long), path, store_schema=False, write_page_checksum=True)
    assert path.stat().st_size < 20_000
    with pytest.raises(RunError, match=r"N0403.*unpacks to more than"):
        ledger.read(path, step=1, run="moonlet")


def test_metrics_do_not_depend_on_when_they_are_written(tmp_path):
    """The same rows give the same bytes, so a ledger can be compared by digest."""
    digests = set()
    for name in ("a", "b"):
        with opened(tmp_path / name) as into:
            fill(into, 1)
        digests.add(hashlib.sha256((tmp_path / name / "moonlet" / ledger.file_name(1)).read_bytes()).hexdigest())
    assert len(digests) == 1


def test_rows_twice_or_none_are_damage(tmp_path):
    with opened(tmp_path) as into:
        fill(into, 1)
    path = tmp_path / "moonlet" / ledger.file_name(1)
    table = ledger.read(path, step=1, run="moonlet")
    for bad, what in (
        (pa.concat_tables([table, table.slice(2, 1)]), "has a row twice"),
        (table.slice(0, 0), "has no rows"),
    ):
        path.write_bytes(ledger.encode(bad))
        with pytest.raises(RunError, match=f"N0403.*{what}"):
            ledger.verify(tmp_path / "moonlet")
    pq.write_table(table.drop(["value"]), path)
    with pytest.raises(RunError, match=r"N0403.*other columns"):
        ledger.verify(tmp_path / "moonlet")
