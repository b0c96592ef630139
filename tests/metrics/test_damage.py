"""A file of the ledger that is not what a sink has written is found, whoever reads it."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nmoe.errors import RunError
from nmoe.metrics import ledger, reader
from tests.metrics.ledgers import expected, fill, opened


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
