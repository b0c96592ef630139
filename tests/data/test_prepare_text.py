"""What a preparation says of its text: where it is bad, what was empty, altered or too large."""

import gzip
import lzma

import pytest

from nmoe.data import documents
from nmoe.data.prepare import Request
from nmoe.data.shards import open_shards
from nmoe.data.tokenizer import BytesTokenizer
from nmoe.errors import RunError
from tests.data.prepared import read_texts, run


def bad_texts():
    fine = b'{"text": "fine"}\n'
    yield "a.txt", b"abc\xff", r"N0253.*not UTF-8\n.*a.txt, byte 3"
    yield "a.txt", b"ab|c\xe2\x82", r"not UTF-8\n.*a.txt, byte 4"
    yield "a.jsonl", fine + b'{"text": "caf\xe9"}', r"not UTF-8\n.*a.jsonl, byte 30"
    yield "a.jsonl", fine + b"\n" + b"{text}", r"not JSON(.|\n)*a.jsonl:3"
    yield "a.jsonl", fine + b"[1]", r"no object with a string `text`\n.*a.jsonl:2"
    yield "a.jsonl", fine + b'{"text": 5}', r"a.jsonl:2"
    yield "a.jsonl", fine + b'{"body": ""}', r"a.jsonl:2"
    yield "a.jsonl", fine + b'{"text": "\\ud800"}', r"lone surrogate(.|\n)*a.jsonl:2"
    yield "a.jsonl", b"[" * 10**5, r"not JSON(.|\n)*a.jsonl:1"
    yield "a.jsonl", b"\xef\xbb\xbf" + fine, r"not JSON(.|\n)*a.jsonl:1"
    yield "a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], r"N0251(.|\n)*a.txt.gz"
    yield "a.txt.gz", b"no gzip", r"N0251(.|\n)*a.txt.gz"
    yield "a.txt.xz", lzma.compress(b"text" * 99)[:-9], r"N0251(.|\n)*a.txt.xz"
    yield "a.txt", b"", r"N0261.*no document is left for `train`"
    yield "a.txt", b"|||", r"N0261.*no document is left for `train`"


@pytest.mark.parametrize(("name", "content", "message"), list(bad_texts()))
def test_bad_text_stops_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RunError, match=message):
        run(tmp_path / name, tmp_path / "out", Request(separator=b"|"))


def test_the_mended_file_continues(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc\xff")
    with pytest.raises(RunError):
        run(path, tmp_path / "out")
    path.write_bytes(b"abc")
    run(path, tmp_path / "out")
    assert read_texts(tmp_path / "out" / "train") == ["abc"]


def test_nothing_held_out_is_said(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(RunError, match=r"N0261.*no document is left for `heldout`"):
        run(tmp_path / "a.txt", tmp_path / "out", Request(heldout_every=2))


def test_empty_documents_are_counted(tmp_path):
    (tmp_path / "a.txt").write_text("one||two||")
    outcome = run(tmp_path / "a.txt", tmp_path / "out", Request(separator=b"|"))
    assert outcome.empty_documents == 2 and read_texts(tmp_path / "out" / "train") == ["one", "two"]


def test_too_large_a_document_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 1000)
    monkeypatch.setattr(documents, "PIECE", 64)
    (tmp_path / "a.txt").write_bytes(b"x" * 500 + b"|" + b"y" * 1200)
    with pytest.raises(RunError, match=r"N0252.*more than 256 MiB\n.*a.txt, byte 501"):
        run(tmp_path / "a.txt", tmp_path / "out", Request(separator=b"|"))


def test_an_altered_document_is_counted(tmp_path):
    class Lowering(BytesTokenizer):
        def encode(self, text):
            return super().encode(text.strip())

    (tmp_path / "a.txt").write_text("one| two|three")
    outcome = run(tmp_path / "a.txt", tmp_path / "out", Request(separator=b"|"), tokenizer=Lowering())
    assert outcome.manifests["train"].altered_documents == 1
    open_shards(tmp_path / "out" / "train").verify()
