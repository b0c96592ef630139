"""The same input gives the same bytes, however the work was cut, killed or divided."""

import gzip
import hashlib
import json
import os
import random
from pathlib import Path

import pytest

from nmoe.data import documents
from nmoe.data import journal as journals
from nmoe.data import prepare as prepare_module
from nmoe.data.documents import find_files, read_batches
from nmoe.data.prepare import Request
from nmoe.data.shards import open_shards
from nmoe.data.tokenizer import BytesTokenizer
from nmoe.errors import ConfigError, RunError
from tests.data.prepared import read_texts, run


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch):
    """What is fsynced matters when the power fails, which no test here plays; it costs minutes."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def tree(directory: Path) -> dict[str, str]:
    """Every file below a directory, by content."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def small_batches(monkeypatch):
    """Many batches and journals out of little text."""
    monkeypatch.setattr(documents, "BATCH_BYTES", 300)
    monkeypatch.setattr(prepare_module, "JOURNAL_BYTES", 1000)


@pytest.fixture
def inputs(texts, tmp_path):
    """Three kinds of file; every text once, in the order of the names."""
    folder = tmp_path / "in"
    folder.mkdir()
    plain, lines, packed = texts(30, 1), texts(40, 2), texts(25, 3)
    (folder / "a.txt").write_bytes("\x1e".join(plain).encode())
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(lines)))
    with gzip.open(folder / "c.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in packed))
    return folder, plain + lines + packed


def test_every_document_arrives_in_order(inputs, tmp_path, small_batches):
    folder, expected = inputs
    outcome = run(folder, tmp_path / "out")
    assert read_texts(tmp_path / "out" / "train") == expected
    manifest = outcome.manifests["train"]
    assert manifest.num_documents == len(expected) and manifest.altered_documents == 0
    assert manifest.text_bytes == sum(len(text.encode()) for text in expected)
    assert {entry.num_tokens for entry in manifest.shards[:-1]} == {1000}
    open_shards(tmp_path / "out" / "train").verify()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train"]


def test_workers_and_batches_do_not_change_a_byte(inputs, tmp_path, monkeypatch):
    folder, _ = inputs
    request = Request(separator=b"\x1e", shard_tokens=1000, heldout_every=7)
    run(folder, tmp_path / "0", request, workers=1)
    for index, (workers, batch_bytes) in enumerate([(1, 1), (3, 700), (8, 100)], start=1):
        monkeypatch.setattr(documents, "BATCH_BYTES", batch_bytes)
        run(folder, tmp_path / str(index), request, workers=workers)
        assert tree(tmp_path / str(index)) == tree(tmp_path / "0")


def test_heldout_every(inputs, tmp_path, small_batches):
    folder, expected = inputs
    run(folder, tmp_path / "out", Request(separator=b"\x1e", shard_tokens=1000, heldout_every=7))
    assert read_texts(tmp_path / "out" / "heldout") == expected[6::7]
    assert read_texts(tmp_path / "out" / "train") == [t for i, t in enumerate(expected) if i % 7 != 6]


def test_heldout_fraction_keeps_equal_documents_together(texts, tmp_path, small_batches):
    drawn = texts(300, 5, 60)
    both = drawn + drawn[::-1]
    (tmp_path / "in.txt").write_bytes("\x1e".join(both).encode())
    run(tmp_path / "in.txt", tmp_path / "out", Request(separator=b"\x1e", shard_tokens=1000, heldout_fraction=0.2))
    train, heldout = (read_texts(tmp_path / "out" / part) for part in ("train", "heldout"))
    assert sorted(train + heldout) == sorted(both) and not set(train) & set(heldout)
    assert 0.1 < len(heldout) / len(both) < 0.3


class Killed(BaseException):
    """What stands for SIGKILL inside one process: nothing of nmoe catches it."""


def kill_at(count):
    """A progress callback that ends the call after so many batches."""
    seen = iter(range(count))

    def progress(_):
        if next(seen, None) is None:
            raise Killed

    return progress


@pytest.mark.parametrize("request_", [
    Request(separator=b"\x1e", shard_tokens=1000, heldout_every=5),
    Request(separator=b"\x1e", shard_tokens=10**6),
], ids=["many shards, two parts", "one shard"])  # fmt: skip
def test_stopped_anywhere_and_continued_is_the_straight_run(inputs, tmp_path, small_batches, request_):
    folder, _ = inputs
    run(folder, tmp_path / "straight", request_)
    total = sum(1 for _ in read_batches(find_files([folder])[0], b"\x1e"))
    assert total > 30
    for stop in range(0, total - 3, 5):
        output = tmp_path / f"stopped{stop}"
        with pytest.raises(Killed):
            run(folder, output, request_, progress=kill_at(stop))
        with pytest.raises(Killed):
            run(folder, output, request_, progress=kill_at(1))
        run(folder, output, request_, workers=1)
        assert tree(output) == tree(tmp_path / "straight")


def test_stopped_while_finishing(inputs, tmp_path, monkeypatch):
    """After each file that the end writes or renames, with a journal of two thirds of the work."""
    folder, _ = inputs
    monkeypatch.setattr(documents, "BATCH_BYTES", 300)
    monkeypatch.setattr(prepare_module, "JOURNAL_BYTES", 20_000)
    request = Request(separator=b"\x1e", shard_tokens=10**6, heldout_every=5)
    run(folder, tmp_path / "straight", request)
    rename, replace = Path.rename, Path.replace
    for stop in range(1, 40):
        output, left = tmp_path / f"stopped{stop}", iter(range(stop))

        def counted(original, left=left):
            def method(self, target):
                result = original(self, target)
                if next(left, None) is None:
                    raise Killed
                return result

            return method

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", counted(rename))
            patch.setattr(Path, "replace", counted(replace))
            try:
                run(folder, output, request, workers=1)
                assert stop > 10
                break
            except Killed:
                pass
        with pytest.raises(Killed):
            run(folder, output, request, progress=kill_at(0))
        assert not list(output.rglob("manifest.json"))
        run(folder, output, request)
        assert tree(output) == tree(tmp_path / "straight")


def test_what_lies_behind_the_journal_is_cut_off(inputs, tmp_path, small_batches):
    """A file system may leave garbage after the durable bytes when the power fails."""
    folder, _ = inputs
    run(folder, tmp_path / "straight")
    for stop in (0, 35):
        output = tmp_path / f"stopped{stop}"
        with pytest.raises(Killed):
            run(folder, output, progress=kill_at(stop))
        for path in list((output / "train").glob("*.part")):
            with path.open("ab") as file:
                file.write(b"\0" * 100_000)
        (output / "train" / "shard_000099.bin").write_bytes(b"stray")
        run(folder, output)
        assert tree(output) == tree(tmp_path / "straight")


def test_work_that_was_done_is_kept(inputs, tmp_path, small_batches):
    folder, expected = inputs
    encoded = []

    class Counting(BytesTokenizer):
        def encode_batch(self, texts):
            encoded.extend(texts)
            return super().encode_batch(texts)

    with pytest.raises(Killed):
        run(folder, tmp_path / "out", workers=1, tokenizer=Counting(), progress=kill_at(40))
    encoded.clear()
    seen = []
    run(folder, tmp_path / "out", workers=1, tokenizer=Counting(), progress=seen.append)
    assert 0 < len(encoded) < len(expected) / 2 and encoded == expected[-len(encoded) :]
    assert seen[0].resumed_bytes > 0 and seen[-1].disk_bytes == seen[-1].total_bytes


@pytest.fixture
def stopped(inputs, tmp_path, small_batches):
    folder, _ = inputs
    with pytest.raises(Killed):
        run(folder, tmp_path / "out", progress=kill_at(35))
    return folder, tmp_path / "out"


@pytest.mark.parametrize(
    "spoil", ["flip shard", "lose shard", "flip part", "lose documents", "journal", "keys", "count", "pipe"]
)
def test_unfinished_data_that_changed_are_refused(stopped, spoil):
    folder, output = stopped
    shard = output / "train" / "shard_000000.bin"
    part = next((output / "train").glob("shard_*.part"))
    journal = output / "prepare.json"
    if spoil in ("flip shard", "flip part"):
        path = shard if spoil == "flip shard" else part
        content = bytearray(path.read_bytes())
        content[3] ^= 1
        path.write_bytes(content)
    elif spoil == "lose shard":
        shard.unlink()
    elif spoil == "lose documents":
        (output / "train" / "documents.bin.part").unlink()
    elif spoil == "journal":
        journal.write_bytes(journal.read_bytes()[:-20])
    elif spoil == "pipe":
        journal.unlink()
        os.mkfifo(journal)
    else:
        table = json.loads(journal.read_bytes())
        if spoil == "keys":
            del table["splits"]["train"]["shard"]
        else:
            table["splits"]["train"]["text_bytes"] += 1
        journal.write_text(json.dumps(table))
    with pytest.raises(RunError, match=r"N0262.*not as it was left"):
        run(folder, output)


def _train(table):
    return table["splits"]["train"]


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.update(next_batch=True),
        lambda table: table.update(next_batch="3"),
        lambda table: table.update(documents=-1),
        lambda table: table.update(documents=table["documents"] + 1),
        lambda table: table.update(inputs_sha256=None),
        lambda table: table.update(other=1),
        lambda table: table.update(splits=[]),
        lambda table: table["splits"].pop("train"),
        lambda table: table["splits"].update(train="x"),
        lambda table: _train(table).update(num_tokens=_train(table)["num_tokens"] + 1),
        lambda table: _train(table).update(num_documents=str(_train(table)["num_documents"])),
        lambda table: _train(table).update(altered_documents=2**40),
        lambda table: _train(table)["shard"].update(bytes=1.5),
        lambda table: _train(table)["shards"].append({"num_tokens": 2**60, "sha256": "0" * 64}),
        lambda table: _train(table)["shards"][0].update(sha256="../x"),
    ],
)
def test_a_sealed_journal_that_does_not_fit_together_is_refused(stopped, change):
    folder, output = stopped
    table = json.loads((output / "prepare.json").read_bytes())
    del table["seal"]
    change(table)
    journals.write(output, table)
    with pytest.raises(RunError, match=r"N0262.*not as it was left"):
        run(folder, output)


def test_changed_inputs_are_refused(stopped):
    folder, output = stopped
    path = folder / "a.txt"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"a", b"b", 1))
    with pytest.raises(RunError, match=r"N0262.*inputs are not those"):
        run(folder, output)
    path.write_bytes(content)
    for other in ("b.jsonl", "c.jsonl.gz"):
        (folder / other).unlink()
    path.write_bytes(content[:100])
    with pytest.raises(RunError, match=r"N0262.*inputs are not those"):
        run(folder, output)


def test_other_options_and_full_directories_are_refused(stopped, tmp_path):
    folder, output = stopped
    with pytest.raises(ConfigError, match=r"N0260.*other options"):
        run(folder, output, Request(separator=b"\x1e", shard_tokens=999))
    run(folder, output)
    with pytest.raises(ConfigError, match=r"N0260.*not empty: it holds `train`"):
        run(folder, output)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"N0260.*not a directory"):
        run(folder, tmp_path / "file")


def test_two_at_once_are_refused(inputs, tmp_path):
    folder, _ = inputs

    def second(_):
        with pytest.raises(ConfigError, match=r"N0260.*another `nmoe data prepare`"):
            run(folder, tmp_path / "out")

    run(folder, tmp_path / "out", progress=second)


def test_a_full_disk_is_said(inputs, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"N0263.*No space left"):
        run(inputs[0], tmp_path / "out")


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64, 2**20])
def test_separators_across_pieces(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(documents, "PIECE", piece)
    draw = random.Random(1)
    for _ in range(40):
        content = "".join(draw.choices(["a", "=", "==", "=b"], k=20)).encode()
        (tmp_path / "a.txt").write_bytes(content)
        records = [r for b in read_batches([tmp_path / "a.txt"], b"==") for r in b.records]
        expected = content.split(b"==")
        assert [r.content for r in records] == (expected[:-1] if expected[-1] == b"" else expected)
        assert all(content[r.offset :].startswith(r.content) for r in records)


def test_files_are_found_in_order(tmp_path):
    for name in ("b/z.txt", "b/a.jsonl.xz", "a.txt.gz", "c.txt", "readme.md", "b/.DS_Store", "d.txt.zst"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    files, ignored = find_files([tmp_path / "c.txt", tmp_path])
    names = [path.relative_to(tmp_path).as_posix() for path in files]
    assert names == ["c.txt", "a.txt.gz", "b/a.jsonl.xz", "b/z.txt", "c.txt"]
    assert [path.name for path in ignored] == [".DS_Store", "d.txt.zst", "readme.md"]
    (tmp_path / "empty").mkdir()
    for bad in ("absent.txt", "readme.md", "empty"):
        with pytest.raises(ConfigError, match="N0250"):
            find_files([tmp_path / bad])
