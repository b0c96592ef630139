"""The packaged text is what it says, and damage is seen."""

import hashlib
import itertools
import json
import lzma
from pathlib import Path

import numpy as np
import pytest

from nmoe.data import corpus
from nmoe.data.corpus import make
from nmoe.data.tokenizer import BytesTokenizer
from nmoe.errors import RunError
from nmoe.registry.data import PackagedTokenizer

FOLDER = Path(corpus.__file__).parent


@pytest.fixture(scope="module")
def plays():
    return {part: corpus.documents("shakespeare", part) for part in ("train", "heldout")}


def test_digests_by_another_reader():
    for (name, part), (size, packed_sha256, sha256) in corpus.DIGESTS.items():
        packed = (FOLDER / f"{name}.{part}.txt.xz").read_bytes()
        text = lzma.decompress(packed)
        assert (len(text), hashlib.sha256(packed).hexdigest(), hashlib.sha256(text).hexdigest()) == (
            size, packed_sha256, sha256,
        )  # fmt: skip


def test_the_plays(plays):
    titles = {part: [text.split("\n", 1)[0] for text in texts] for part, texts in plays.items()}
    assert titles["heldout"] == ["Macbeth", "Twelfth Night"]
    assert len(titles["train"]) == 36 and len(set(titles["train"]) | set(titles["heldout"])) == 38
    heldout = sum(map(len, plays["heldout"]))
    assert 0.04 < heldout / (heldout + sum(map(len, plays["train"]))) < 0.06
    origin = (FOLDER / "ORIGIN.md").read_text()
    assert "Macbeth" in origin and "Twelfth Night" in origin and make.HELDOUT_PLAYS == ("macbeth", "twelfth-night")


def test_no_speech_of_a_heldout_play_is_in_train(plays):
    """No two lines in a row of more than 60 letters; single short lines (`Enter Attendants`) may repeat."""
    train, heldout = (
        {pair for text in plays[part] for pair in itertools.pairwise(text.split("\n")) if sum(map(len, pair)) > 60}
        for part in ("train", "heldout")
    )
    assert len(heldout) > 2000 and not train & heldout


def test_plain_text_remains(plays):
    for texts in plays.values():
        for text in texts:
            assert text.isascii() and text.endswith("\n") and not set("*_#\\\x1e\r\t") & set(text)
            assert " \n" not in text and "\n\n\n" not in text


def test_cleaning():
    markdown = "# King\n\n\n### SCENE I. A *hall*.\n\n**KING**  \nWho\u2014comes?  \n"
    markdown += "\\--he. _\\[Aside]_  \n10\\. Two\n\n"
    assert make.clean(markdown) == "King\n\nSCENE I. A hall.\n\nKING\nWho--comes?\n--he. [Aside]\n10. Two\n"
    with pytest.raises(ValueError, match="é"):
        make.clean("café")


def test_tokens_are_the_text(plays):
    source = corpus.load("shakespeare", "heldout", BytesTokenizer())
    first = plays["heldout"][0].encode()
    assert source.read(0, len(first) + 2).tolist() == [256, *first, 256]
    assert source.document_starts.tolist() == [0, 1 + len(first)]
    assert source.num_tokens == 214_210 and source.digest == HELDOUT_DIGEST
    with pytest.raises(ValueError):
        source.read(0, 214_211)


HELDOUT_DIGEST = "6f36852e021f28ff656999938db5d1a8fdd34fbabf685f4b8d8328d4abf14f21"


def test_the_vocabulary_is_learnt_from_the_training_plays_alone(plays):
    packaged, again = json.loads((FOLDER / "shakespeare.tokenizer.json").read_bytes()), json.loads(
        make.vocabulary(plays["train"])
    )  # fmt: skip
    assert packaged["model"]["vocab"] == again["model"]["vocab"]
    assert packaged["model"]["merges"] == again["model"]["merges"]


def test_the_vocabulary_loses_nothing(plays):
    tokenizer = corpus.tokenizer("shakespeare")
    assert tokenizer.vocab_size == PackagedTokenizer.known_vocab_size == make.VOCAB_SIZE
    assert (tokenizer.decode(np.array([tokenizer.end_of_document])), tokenizer.token_bytes_V[0]) == ("", 0)
    every_byte = "".join(map(chr, range(256))) + "\U0001f3ad <|end|>"
    for text in (*plays["heldout"], plays["train"][0], every_byte):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.end_of_document not in ids
        assert tokenizer.token_bytes_V[ids].sum() == len(text.encode())


def test_a_damaged_vocabulary_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "files", lambda _: tmp_path)
    packaged = (FOLDER / "shakespeare.tokenizer.json").read_text()
    (tmp_path / "shakespeare.tokenizer.json").write_text(packaged.replace("thou", "tuoh", 1))
    with pytest.raises(RunError, match=r"N0201.*`shakespeare.tokenizer.json` is damaged"):
        corpus.tokenizer("shakespeare")


def test_damage_stops(tmp_path, monkeypatch):
    name = "shakespeare.heldout.txt.xz"
    packed = bytearray((FOLDER / name).read_bytes())
    monkeypatch.setattr(corpus, "files", lambda _: tmp_path)
    packed[len(packed) // 2] ^= 1
    (tmp_path / name).write_bytes(packed)
    with pytest.raises(RunError, match=r"N0201.*`shakespeare.heldout.txt.xz` is damaged \(packed\)"):
        corpus.documents("shakespeare", "heldout")
    text = lzma.compress(b"other text")
    (tmp_path / name).write_bytes(text)
    digests = {("shakespeare", "heldout"): (214_210, hashlib.sha256(text).hexdigest(), "0" * 64)}
    monkeypatch.setattr(corpus, "DIGESTS", digests)
    with pytest.raises(RunError, match=r"\(unpacked\)"):
        corpus.documents("shakespeare", "heldout")
