"""Tokenizers against the libraries themselves, against each other, and against bad files."""

import base64
import json
import os

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.data import corpus
from nmoe.data.tokenizer import PATTERNS, BytesTokenizer, HuggingFaceTokenizer, TiktokenTokenizer, token_dtype
from nmoe.errors import ConfigError

END = "<|endoftext|>"
SAMPLES = ["", "Now, fair Hippolyta", "naïve café — €5, 😀\n\n  tabs\t\r\n", f"text {END} text",
           "x" * 300, "I'LL we'Re 12345"]


def byte_level():
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return made


@pytest.fixture(scope="module")
def trained():
    """A byte-level BPE of 600 tokens and <|endoftext|>, trained on a play."""
    made = byte_level()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=601, special_tokens=[END], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator([corpus.documents("shakespeare", "heldout")[0][:60_000]], trainer)
    return made


@pytest.fixture(scope="module")
def json_path(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    trained.save(str(path))
    return path


@pytest.fixture(scope="module")
def byte_of():
    """GPT-2's alphabet of bytes: printable bytes stand for themselves, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


@pytest.fixture(scope="module")
def ranks(json_path, byte_of):
    """The same merges as ranks: 256 bytes, then the merges in their order."""
    merges = json.loads(json_path.read_text())["model"]["merges"]
    tokens = [bytes([b]) for b in range(256)] + [bytes(byte_of[c] for c in a + b) for a, b in merges]
    return {token: rank for rank, token in enumerate(tokens)}


@pytest.fixture(scope="module")
def ranks_path(ranks, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "small.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return path


def open_hf(path, end=END):
    return HuggingFaceTokenizer(path=str(path), end_of_document=end)


def open_tt(path, pattern="gpt2"):
    return TiktokenTokenizer(path=str(path), pattern=pattern)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text())
def test_bytes_are_utf8(text):
    tokenizer = BytesTokenizer()
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode("utf-8")) and ids.dtype == tokenizer.dtype == np.uint16
    assert tokenizer.decode(np.append(ids, 256)) == text
    assert tokenizer.token_bytes_V[ids].sum() == len(ids) and tokenizer.token_bytes_V[256] == 0


@pytest.mark.parametrize("text", SAMPLES)
def test_huggingface_gives_the_library_s_ids(json_path, text):
    tokenizer, library = open_hf(json_path), tokenizers.Tokenizer.from_file(str(json_path))
    expected = [i for part in text.split(END) for i in library.encode(part).ids]
    if END in text:
        # Spelt in the text, the special token is text: the library alone would end a document here.
        assert library.token_to_id(END) in library.encode(text).ids
        assert tokenizer.end_of_document not in tokenizer.encode(text)
    else:
        assert tokenizer.encode(text).tolist() == expected
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("text", SAMPLES)
def test_tiktoken_gives_the_library_s_ids(ranks, ranks_path, pattern, text):
    tokenizer = open_tt(ranks_path, pattern)
    library = tiktoken.Encoding("x", pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens={})
    assert tokenizer.encode(text).tolist() == library.encode_ordinary(text)
    assert tokenizer.decode(np.append(tokenizer.encode(text), tokenizer.end_of_document)) == text


def test_both_libraries_cut_a_play_alike(json_path, ranks, ranks_path, byte_of, trained):
    """The same merges in both formats: the same pieces of text."""
    text = corpus.documents("shakespeare", "heldout")[1]
    vocabulary = {index: token for token, index in trained.get_vocab().items()}
    of_rank = {rank: token for token, rank in ranks.items()}
    hf = [bytes(byte_of[c] for c in vocabulary[i]) for i in open_hf(json_path).encode(text).tolist()]
    assert hf == [of_rank[i] for i in open_tt(ranks_path).encode(text).tolist()]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=st.text())
def test_token_bytes_add_up(json_path, ranks_path, text):
    for tokenizer in (open_hf(json_path), open_tt(ranks_path)):
        assert tokenizer.token_bytes_V[tokenizer.encode(text)].sum() == len(text.encode("utf-8"))
        assert tokenizer.token_bytes_V[tokenizer.end_of_document] == 0
        assert len(tokenizer.token_bytes_V) == tokenizer.vocab_size


def test_patterns_are_the_published_ones(monkeypatch):
    from tiktoken_ext import openai_public

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *a, **k: {})
    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda *a, **k: {})
    encodings = {"gpt2": openai_public.gpt2, "cl100k": openai_public.cl100k_base, "o200k": openai_public.o200k_base}
    published = {name: make() for name, make in encodings.items()}
    from nmoe.data.tokenizer import PUBLISHED_END_OF_TEXT

    for (name, _), end in PUBLISHED_END_OF_TEXT.items():
        assert published[name]["special_tokens"][END] == end
    assert {name: fields["pat_str"] for name, fields in published.items()} == PATTERNS


def test_a_sentencepiece_spelling_counts_bytes(tmp_path):
    vocabulary = {"<unk>": 0, "</s>": 1, "\u2581the": 2, "<0xE2>": 3, "é": 4, "\u2581": 5}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    made.add_special_tokens(["<unk>", "</s>"])
    made.decoder = tokenizers.decoders.Metaspace()
    made.save(str(tmp_path / "tokenizer.json"))
    assert open_hf(tmp_path / "tokenizer.json", "</s>").token_bytes_V.tolist() == [0, 0, 4, 1, 2, 1]


def test_padding_and_truncation_of_the_file_are_off(trained, tmp_path):
    made = tokenizers.Tokenizer.from_str(trained.to_str())
    made.enable_truncation(3)
    made.enable_padding(length=50)
    made.save(str(tmp_path / "tokenizer.json"))
    text = "When shall we three meet again"
    ids = open_hf(tmp_path / "tokenizer.json").encode(text)
    assert ids.tolist() == trained.encode(text).ids and 3 < len(ids) < 50


def test_digest_is_of_the_content(json_path, ranks_path, tmp_path):
    for path, make in ((json_path, open_hf), (ranks_path, open_tt)):
        copy = tmp_path / path.name
        copy.write_bytes(path.read_bytes())
        assert make(copy).digest == make(path).digest
        copy.write_bytes(path.read_bytes() + b"\n")
        assert make(copy).digest != make(path).digest
    assert len({open_tt(ranks_path, pattern).digest for pattern in PATTERNS}) == 3
    assert len({open_hf(json_path).digest, open_hf(json_path, "e").digest}) == 2
    assert BytesTokenizer().digest == "c1fc6ae0c76ea647bd2d76dddfa06c48420b0b3b7102323f84d0fbd2ba1aa6ae"


def test_a_text_token_as_end_of_document_stops(json_path):
    with pytest.raises(ConfigError, match=r"N0231.*end-of-document token `e`"):
        open_hf(json_path, "e").encode("e!")


def test_dtype_holds_every_id():
    assert token_dtype(2**16) == np.uint16 and token_dtype(2**16 + 1) == np.uint32


def bad_ranks(ranks):
    good = [base64.b64encode(token) + b" %d" % rank for token, rank in ranks.items()]
    yield "line of tiktoken", [*good[:5], b"!!!! 5", *good[6:]], 6
    yield "line of tiktoken", [*good, b"AAAA"], len(good) + 1
    yield "line of tiktoken", [b"AA== -1", *good], 1
    yield "line of tiktoken", [b"AA== 99999999999999999999", *good], 1
    yield "out of order", [*good[:5], good[6], good[5], *good[7:]], 6
    yield "out of order", [*good, good[3].split()[0] + b" %d" % len(good)], len(good) + 1
    yield "byte 0xff has no rank", good[:255], 0
    yield "byte 0x00 has no rank", [], 0


def test_bad_ranks_are_refused(ranks, tmp_path):
    path = tmp_path / "bad.tiktoken"
    for message, lines, line in bad_ranks(ranks):
        path.write_bytes(b"\n".join(lines))
        with pytest.raises(ConfigError, match=message) as caught:
            open_tt(path)
        assert caught.value.diagnostics[0].line == line


def test_bad_json_is_refused(json_path, tmp_path):
    path = tmp_path / "tokenizer.json"
    for content in (b"", b"{}", b"[" * 100_000, b"\xff\xfe", b'{"version": "1.0"}', json_path.read_bytes()[:-50]):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="N0230"):
            open_hf(path)
    with pytest.raises(ConfigError, match=r"no token `</s>`(.|\n)*one of: <\|endoftext\|>"):
        open_hf(json_path, "</s>")
    with pytest.raises(ConfigError, match=r"N0230.*No such file"):
        open_hf(tmp_path / "absent.json")


def test_a_decoder_with_parts_that_are_none_is_read_without_them(json_path, tmp_path):
    table = json.loads(json_path.read_text())
    table["decoder"]["decoders"] = None
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(table))
    assert np.array_equal(open_hf(path).token_bytes_V, open_hf(json_path).token_bytes_V)


def test_a_key_twice_is_refused(json_path, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text('{"decoder": null, ' + json_path.read_text().lstrip()[1:])
    with pytest.raises(ConfigError, match=r"N0230.*a key stands twice"):
        open_hf(path)


def test_what_the_library_says_of_a_file_is_cut(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps("a" * 100_000))
    with pytest.raises(ConfigError, match="N0230") as caught:
        open_hf(path)
    assert len(caught.value.render()) < 1000


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"N0230.*not a regular file"):
        open_hf(tmp_path / "tokenizer.json")


def test_more_ranks_than_ids_may_be_are_refused(ranks_path, ranks, monkeypatch):
    monkeypatch.setattr("nmoe.data.tokenizer.MAX_VOCAB", len(ranks))
    with pytest.raises(ConfigError, match=r"N0230.*it has \d+ ranks"):
        open_tt(ranks_path)
    monkeypatch.setattr("nmoe.data.tokenizer.MAX_VOCAB", len(ranks) + 1)
    open_tt(ranks_path)


def test_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("nmoe.data.tokenizer.MAX_FILE_BYTES", 10)
    (tmp_path / "t.json").write_bytes(b" " * 11)
    with pytest.raises(ConfigError, match="larger"):
        open_hf(tmp_path / "t.json")
