"""Tokenizer files: bytes as a tokenizer.json, byte for byte, and a run on shards that is given its own."""

import base64
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nmoe.cli.main import run as nmoe
from nmoe.data import corpus
from nmoe.data.tokenizer import BytesTokenizer, TiktokenTokenizer
from nmoe.export.tokenizer import tokenizer_files
from nmoe.plan.resolve import resolve
from nmoe.train.loop import train

HERE = Path(__file__).parent
BYTES = BytesTokenizer()
LIBRARY = tokenizers.Tokenizer.from_str(tokenizer_files(BYTES, context=32)["tokenizer.json"].decode())
LIBRARY.encode_special_tokens = True


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.text(max_size=60))
@example("<|end|> it's  two\u00a0spaces\r\n\n\t\u0000 \u2028na\u00efve cafe\u0301 \u706b\U0001f525 ")
def test_bytes_as_a_tokenizer_json(text):
    """The same ids for every text, and the same text back."""
    ids = BYTES.encode(text).tolist()
    assert LIBRARY.encode(text, add_special_tokens=False).ids == ids
    assert LIBRARY.decode(ids) == text


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 256), max_size=40))
@example([0xE2, 0x82, 256, 0xAC, 0xFF, 0xC0, 0x80, 0xF0, 0x9F])
def test_bytes_that_are_no_text_decode_alike(ids):
    assert LIBRARY.decode(ids, skip_special_tokens=True) == BYTES.decode(np.array(ids, np.int64))


def test_what_ends_a_document():
    settings_of = json.loads(tokenizer_files(BYTES, context=32)["tokenizer_config.json"])
    assert LIBRARY.token_to_id(settings_of["eos_token"]) == BYTES.end_of_document
    assert settings_of["model_max_length"] == 32
    assert LIBRARY.get_vocab_size() == BYTES.vocab_size


def test_a_tokenizer_json_is_handed_on_as_it_is():
    packaged = corpus.tokenizer("shakespeare")
    content = tokenizer_files(packaged, context=32)["tokenizer.json"]
    assert content == (Path(corpus.__file__).parent / "shakespeare.tokenizer.json").read_bytes()


def test_tiktoken_has_none(tmp_path):
    lines = (f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    (tmp_path / "ranks.tiktoken").write_text("".join(lines))
    assert tokenizer_files(TiktokenTokenizer(path=str(tmp_path / "ranks.tiktoken"), pattern="gpt2"), context=32) == {}


@pytest.fixture(scope="module")
def on_shards(tmp_path_factory):
    """A run of two steps on shards that the packaged vocabulary made."""
    place = tmp_path_factory.mktemp("shards")
    (place / "play.txt").write_text(corpus.documents("shakespeare", "heldout")[0][:40_000])
    (place / "tokenizer.json").write_bytes(corpus.tokenizer("shakespeare").content)
    prepared = ["data", "prepare", str(place / "play.txt"), "-o", str(place / "play"),
                "--tokenizer", str(place / "tokenizer.json"), "--end-of-document", corpus.END_OF_DOCUMENT]  # fmt: skip
    assert nmoe(prepared) == 0
    text = (HERE / "mixtral.toml").read_text() + "\n[data]\nkind = \"shards\"\n" + f'train = "{place}/play/train"\n'
    (place / "base.toml").write_text((HERE / "base.toml").read_text().replace("[eval.bpb]\nmax_tokens = 256\n", ""))
    (place / "shards.toml").write_text(text)
    sets = [f'output.run_dir="{place}/run"', "model.vocab_size=2048", "output.stop_after_step=2"]
    assert train(resolve(place / "shards.toml", sets), config_text="").exit_code == 0
    return place


def test_shards_are_given_their_tokenizer(on_shards, tmp_path, capsys):
    given = str(on_shards / "tokenizer.json")
    assert nmoe(["export", str(on_shards / "run"), "-o", str(tmp_path / "out"), "--tokenizer", given]) == 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (on_shards / "tokenizer.json").read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == corpus.tokenizer("shakespeare").end_of_document
    assert "no tokenizer files" not in capsys.readouterr().err


def test_shards_without_it(on_shards, tmp_path, capsys):
    assert nmoe(["export", str(on_shards / "run"), "-o", str(tmp_path / "out")]) == 0
    assert "give it with --tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert "held-out bits per byte | not measured at this step" in (tmp_path / "out" / "README.md").read_text()


def test_another_tokenizer_is_refused(on_shards, tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_bytes((on_shards / "tokenizer.json").read_bytes() + b"\n")
    for path, words in ((other, "its digest is another one"), (tmp_path / "none.json", "tokenizers cannot read it")):
        assert nmoe(["export", str(on_shards / "run"), "-o", str(tmp_path / "out"), "--tokenizer", str(path)]) == 2
        said = capsys.readouterr().err
        assert "error[N0918]" in said
        assert words in said
    assert not (tmp_path / "out").exists()


def test_data_that_is_gone_or_changed(on_shards, tmp_path, capsys):
    """Without the data nobody knows what ends a document: said, and left open. Other data is refused."""
    play, args = on_shards / "play" / "train", [str(on_shards / "run"), "-o", str(tmp_path / "out")]
    play.rename(on_shards / "aside")
    try:
        assert nmoe(["export", *args]) == 0
        assert "no tokenizer files and no eos_token_id are written" in capsys.readouterr().err
        assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] is None
        (on_shards / "other.txt").write_text(corpus.documents("shakespeare", "heldout")[0][:10_000])
        prepared = ["data", "prepare", str(on_shards / "other.txt"), "-o", str(on_shards / "play"),
                    "--tokenizer", "bytes"]  # fmt: skip
        assert nmoe(prepared) == 0
        assert nmoe(["export", str(on_shards / "run"), "-o", str(tmp_path / "second")]) == 1
        assert "error[N0917]" in capsys.readouterr().err
    finally:
        shutil.rmtree(play, ignore_errors=True)
        (on_shards / "aside").rename(play)
