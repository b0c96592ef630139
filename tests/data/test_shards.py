"""Shards give back what was written, and any change to them stops the reader."""

import hashlib
import json
import os
import re
import shutil
import struct

import numpy as np
import pytest

from nmoe.data import shards
from nmoe.data.manifest import BLOCK_BYTES
from nmoe.data.shards import open_shards
from nmoe.data.source import MemorySource
from nmoe.data.tokenizer import BytesTokenizer
from nmoe.errors import RunError


@pytest.fixture
def directory(texts, write_shards):
    """Several shards, documents across their borders, the last shard shorter."""
    return write_shards(texts(60, 1), 2500)


@pytest.fixture
def lazy(monkeypatch):
    """Check blocks when they are read, as for large data."""
    monkeypatch.setattr(shards, "WHOLE_CHECK_BYTES", 0)


@pytest.fixture(params=[2**28, 0], ids=["whole", "lazy"])
def either(request, monkeypatch):
    monkeypatch.setattr(shards, "WHOLE_CHECK_BYTES", request.param)


def read_all(directory):
    source = open_shards(directory)
    return source.read(0, source.num_tokens)


def test_round_trip(texts, directory, either):
    memory, source = MemorySource(texts(60, 1), BytesTokenizer()), open_shards(directory)
    assert len(source.manifest.shards) > 3
    assert source.num_tokens == memory.num_tokens and source.tokenizer_digest == memory.tokenizer_digest
    assert np.array_equal(source.document_starts, memory.document_starts)
    assert np.array_equal(source.token_bytes_V, memory.token_bytes_V)
    assert np.array_equal(source.read(0, source.num_tokens), memory.read(0, memory.num_tokens))
    for start, stop in [(0, 0), (0, 1), (2499, 2501), (2400, 7700), (source.num_tokens,) * 2]:
        assert source.read(start, stop).dtype == np.int64
        assert np.array_equal(source.read(start, stop), memory.read(start, stop))
    with pytest.raises(ValueError):
        source.read(0, source.num_tokens + 1)
    with pytest.raises(ValueError):
        source.read(-1, 4)


def test_files_are_plain(texts, directory):
    """The format by its description alone: little-endian tokens, uint64 offsets, canonical JSON."""
    manifest = json.loads((directory / "manifest.json").read_bytes())
    raw = b"".join((directory / entry["file"]).read_bytes() for entry in manifest["shards"])
    tokens = struct.unpack(f"<{manifest['num_tokens']}H", raw)
    starts = struct.unpack(f"<{manifest['num_documents']}Q", (directory / "documents.bin").read_bytes())
    documents = [tokens[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
    assert [(d[0], bytes(d[1:]).decode()) for d in documents] == [(256, text) for text in texts(60, 1)]
    again = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    assert again == (directory / "manifest.json").read_bytes()


def test_verify_passes_and_reports(directory):
    source, seen = open_shards(directory), []
    source.verify(lambda done, total: seen.append((done, total)))
    assert seen[-1] == (source.num_tokens, source.num_tokens) and seen == sorted(seen)


def test_every_flipped_byte_of_a_shard_is_found(directory, either):
    path = directory / "shard_000001.bin"
    good = path.read_bytes()
    for position in range(0, len(good), 97):
        bad = bytearray(good)
        bad[position] ^= 1 << position % 8
        path.write_bytes(bad)
        with pytest.raises(RunError, match=r"N0243.*`shard_000001.bin`"):
            read_all(directory)
    path.write_bytes(good)
    read_all(directory)


@pytest.mark.parametrize("name", ["blocks.bin", "documents.bin", "token_bytes.bin"])
def test_flipped_tables_are_found(directory, name, either):
    content = bytearray((directory / name).read_bytes())
    content[len(content) // 2] ^= 4
    (directory / name).write_bytes(content)
    with pytest.raises(RunError, match=rf"N0243.*`{name}`"):
        _ = open_shards(directory).document_starts


def test_lost_truncated_grown_and_strange_files_are_found(directory, either):
    for name in sorted(path.name for path in directory.iterdir() if path.name != "manifest.json"):
        copy = directory.parent / "copy"
        for spoil, words in (
            (lambda path: path.unlink(), "is missing"),
            (lambda path: path.write_bytes(path.read_bytes()[:-1]), "where the manifest says"),
            (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "where the manifest says"),
            (lambda path: (path.unlink(), path.mkdir()), "where the manifest says"),
        ):
            shutil.copytree(directory, copy)
            spoil(copy / name)
            with pytest.raises(RunError, match=rf"N0242.*`{name}` .*{words}"):
                open_shards(copy)
            shutil.rmtree(copy)
    (directory / "shard_000099.bin").write_bytes(b"")
    with pytest.raises(RunError, match=r"N0242.*`shard_000099.bin` is not in the manifest"):
        open_shards(directory)


def test_swapped_shards_are_found(directory, either):
    a, b = directory / "shard_000000.bin", directory / "shard_000001.bin"
    first, second = a.read_bytes(), b.read_bytes()
    assert len(first) == len(second)
    a.write_bytes(second), b.write_bytes(first)
    with pytest.raises(RunError, match="N0243"):
        read_all(directory)


def test_all_that_is_wrong_is_told_at_once(directory, either):
    """Of files' sizes when the directory is opened; of their content by `verify`, or when small data are opened."""
    names = ["shard_000000.bin", "shard_000002.bin"]
    for name in names:
        content = bytearray((directory / name).read_bytes())
        content[7] ^= 64
        (directory / name).write_bytes(content)
    with pytest.raises(RunError) as caught:
        open_shards(directory).verify()
    assert [re.findall(r"`(.*?)`", one.message) for one in caught.value.diagnostics] == [[name] for name in names]
    (directory / names[0]).unlink()
    (directory / "shard_000099.bin").write_bytes(b"")
    (directory / "documents.bin").write_bytes(b"")
    with pytest.raises(RunError) as caught:
        open_shards(directory)
    found = {re.findall(r"`(.*?)`", one.message)[0] for one in caught.value.diagnostics}
    assert found == {names[0], "documents.bin", "shard_000099.bin"}


def test_a_pipe_in_the_manifests_place_is_refused(directory):
    (directory / "manifest.json").unlink()
    os.mkfifo(directory / "manifest.json")
    with pytest.raises(RunError, match=r"N0240.*not a regular file"):
        open_shards(directory)


def test_a_large_directory_is_checked_where_it_is_read(texts, write_shards, lazy):
    """Blocks of 128 KiB: a flipped bit stops the read that touches its block and no other."""
    directory = write_shards(texts(1200, 3, 900), 2**18)
    path = directory / "shard_000001.bin"
    content = bytearray(path.read_bytes())
    content[BLOCK_BYTES + 7] ^= 1
    path.write_bytes(content)
    source, per_block = open_shards(directory), BLOCK_BYTES // 2
    source.read(0, 2**18 + per_block)
    with pytest.raises(RunError, match=rf"N0243.*`shard_000001.bin` .*bytes {BLOCK_BYTES} and after"):
        source.read(2**18 + per_block - 1, 2**18 + per_block + 1)
    with pytest.raises(RunError, match="N0243"):
        source.read(2**18 + per_block, 2**18 + per_block + 1)
    with pytest.raises(RunError, match="N0243"):
        source.verify()


def reseal(directory, change):
    """Change the manifest's tree and write it in canonical form."""
    path = directory / "manifest.json"
    tree = json.loads(path.read_bytes())
    change(tree)
    path.write_text(json.dumps(tree, sort_keys=True, separators=(",", ":")))


def put(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(tree):
        for key in keys:
            tree = tree[key]
        tree[last] = value

    return change


BAD_MANIFESTS = {
    "unknown key": (put("colour", 1), "unknown key 'colour'"),
    "unknown key inside": (put("tokenizer", "path", "x"), "`tokenizer` has the unknown key"),
    "missing key": (lambda tree: tree.pop("dtype"), "lacks 'dtype'"),
    "other format": (put("format", "npy"), "format 'npy'"),
    "later version": (put("version", 2), "version 2"),
    "version true": (put("version", True), "version True"),
    "wrong dtype": (put("dtype", "uint32"), "must be uint16"),
    "object dtype": (put("dtype", "object"), "must be uint16"),
    "absurd count": (put("num_tokens", 2**60), "num_tokens must be"),
    "absurd shard": (put("shards", 0, "num_tokens", 2**60), "num_tokens of shard 0 must be"),
    "float count": (put("num_tokens", 5.0), "num_tokens must be"),
    "negative": (put("shards", 0, "num_tokens", -1), "must be an integer"),
    "sum is off": (put("shards", 0, "num_tokens", 1), "do not add up"),
    "traversal": (put("shards", 0, "file", "../../etc/passwd"), "is called '../../etc/passwd'"),
    "absolute": (put("shards", 0, "file", "/etc/passwd"), "is called"),
    "reordered": (lambda tree: tree["shards"].reverse(), "is called"),
    "no shards": (put("shards", []), "1 to 1000000"),
    "shards a table": (put("shards", {}), "1 to 1000000"),
    "shard a number": (put("shards", 0, 1), "shard 0 is not a table"),
    "no digest": (put("blocks_sha256", "xyz"), "no SHA-256"),
    "upper case": (put("documents_sha256", "A" * 64), "no SHA-256"),
    "number as digest": (put("tokenizer", "digest", 5), "no SHA-256"),
    "vocabulary": (put("tokenizer", "vocab_size", 2**40), "vocab_size must be"),
    "end outside": (put("tokenizer", "end_of_document", 257), "end_of_document must be"),
    "kind": (put("tokenizer", "kind", "eval"), "tokenizer kind"),
    "more documents than tokens": (put("num_documents", 2**50), "num_documents must be"),
}


@pytest.mark.parametrize("name", BAD_MANIFESTS)
def test_bad_manifests_are_refused(directory, name):
    change, words = BAD_MANIFESTS[name]
    reseal(directory, change)
    with pytest.raises(RunError, match="N0241") as caught:
        open_shards(directory)
    assert words in str(caught.value)


def test_manifests_that_are_no_manifest_are_refused(directory):
    path = directory / "manifest.json"
    good = path.read_bytes()
    for content in (b"", b"[]", b"nul", b"\xff", b"[" * 10**6, good[:-1], good.replace(b":", b": ", 1),
                    good.replace(b'"version":1', b'"version":1,"version":1'), good + b"\n", b"NaN"):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(RunError, match="N0241"):
            open_shards(directory)
    path.unlink()
    with pytest.raises(RunError, match="N0240"):
        open_shards(directory)


def test_the_help_names_the_part(directory):
    with pytest.raises(RunError, match=r"name its part: .*train"):
        open_shards(directory.parent)


def test_resealed_content_is_found_by_verify(texts, write_shards, directory):
    """Digests that fit, facts that do not: only reading everything can show it."""
    reseal(directory, lambda tree: tree.update(text_bytes=tree["text_bytes"] + 1))
    with pytest.raises(RunError, match=r"N0241.*text_bytes"):
        open_shards(directory).verify()


def test_an_offset_too_many_is_found_by_verify(directory):
    """A document that begins where no end-of-document token stands."""
    import hashlib

    content = (directory / "documents.bin").read_bytes()
    last = json.loads((directory / "manifest.json").read_bytes())["num_tokens"] - 1
    content += struct.pack("<Q", last)
    (directory / "documents.bin").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    reseal(directory, lambda tree: tree.update(documents_sha256=digest, num_documents=len(content) // 8))
    with pytest.raises(RunError, match=r"N0243.*`documents.bin` .*60 documents found"):
        open_shards(directory).verify()


@pytest.mark.parametrize("offsets", [[2**63 + 1], [2**62, 2**63 + 1], [2**64 - 1], [1, 1], [5, 3]])
def test_offsets_that_do_not_ascend_or_that_wrap_as_signed_numbers_are_refused(directory, offsets):
    """[0, 2^62, 2^63 + 1] ascends as signed 64-bit differences do, and ends with a negative number."""
    content = np.array([0, *offsets], "<u8").tobytes()
    (directory / "documents.bin").write_bytes(content)
    reseal(directory, lambda m: m.update(
        num_documents=1 + len(offsets), documents_sha256=hashlib.sha256(content).hexdigest()))  # fmt: skip
    with pytest.raises(RunError, match=r"N0241.*do not ascend"):
        _ = open_shards(directory).document_starts


def test_a_pipe_in_the_place_of_the_manifest_is_not_waited_for(directory):
    (directory / "manifest.json").unlink()
    os.mkfifo(directory / "manifest.json")
    with pytest.raises(RunError, match=r"N0240.*not a regular file"):
        open_shards(directory)


def test_an_id_outside_the_vocabulary_stops(directory):
    """Shards resealed with an id that no embedding has."""
    import hashlib

    path = directory / "shard_000000.bin"
    tokens = np.frombuffer(path.read_bytes(), "<u2").copy()
    tokens[5] = 257
    path.write_bytes(tokens.tobytes())
    blocks = bytearray((directory / "blocks.bin").read_bytes())
    blocks[:32] = hashlib.sha256(tokens.tobytes()).digest()
    (directory / "blocks.bin").write_bytes(blocks)

    def change(tree):
        tree["blocks_sha256"] = hashlib.sha256(blocks).hexdigest()
        tree["shards"][0]["sha256"] = hashlib.sha256(tokens.tobytes()).hexdigest()

    reseal(directory, change)
    with pytest.raises(RunError, match=r"N0241.*outside the vocabulary"):
        read_all(directory)


def test_digest_names_content(texts, write_shards):
    a = open_shards(write_shards(texts(9, 1), 500, "a")).digest
    assert a == open_shards(write_shards(texts(9, 1), 500, "b")).digest
    assert a != open_shards(write_shards(texts(9, 2), 500, "c")).digest
