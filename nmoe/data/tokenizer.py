"""Tokenizers: text to ids and back, with the bytes that each id stands for.

Three kinds: bytes (built in), a `tokenizer.json` of Hugging Face's tokenizers, and a file of ranks
in tiktoken's format. All encode text as ordinary text, also where it spells a special token, so
that no document can end another one. `digest` is the SHA-256 of a short text that holds the kind,
the SHA-256 of the file's bytes and whatever else decides the ids; the path is not in it.

`token_bytes_V` counts the bytes of UTF-8 text behind each id, so that bits per byte can be computed
from token losses. For bytes, for tiktoken and for byte-level `tokenizer.json` files the counts of
a text's tokens add up to the text's bytes exactly. A `tokenizer.json` that changes the text (Unicode
normalisation, an added space, unknown characters) can miss; `nmoe data prepare` counts such documents.
"""

import base64
import binascii
import hashlib
import json
import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nmoe import strict_json
from nmoe.data import files
from nmoe.errors import ConfigError, Diagnostic

MAX_FILE_BYTES = 256 * 2**20
MAX_VOCAB = 2**24
SAID = 300  # characters of a library's word for what is wrong: it may quote the whole file


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of little-endian uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(["nmoe tokenizer 1", *parts], ensure_ascii=True).encode("ascii")).hexdigest()


def _bad_file(path: str | Path, message: str, *, help: str, line: int = 0) -> ConfigError:
    return ConfigError(Diagnostic(code="N0230", message=message, path=str(path), line=line, help=help))


def _read(path: str | Path) -> bytes:
    """The file's bytes, at most 256 MiB of them."""
    try:
        content = files.read(Path(path), limit=MAX_FILE_BYTES)
    except OSError as error:
        cause = error.strerror or error
        raise _bad_file(path, f"the tokenizer cannot be read: {cause}", help="check the path") from error
    if len(content) > MAX_FILE_BYTES:
        raise _bad_file(path, "the tokenizer file is larger than 256 MiB", help="check that it is a tokenizer")
    return content


class Tokenizer(Protocol):
    """What every kind has. dtype: the smallest of little-endian uint16 and uint32 for its ids."""

    @property
    def kind(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def end_of_document(self) -> int: ...
    @property
    def token_bytes_V(self) -> np.ndarray: ...
    @property
    def dtype(self) -> np.dtype: ...

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, without an end-of-document token (dtype)."""
        ...

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """encode of each text; libraries that have threads use them here."""
        ...

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids, special ones left out, bytes that are no UTF-8 as U+FFFD."""
        ...


class BytesTokenizer:
    """A token is a byte of UTF-8; 256 ends a document."""

    kind = "bytes"
    vocab_size = 257
    end_of_document = 256

    def __init__(self) -> None:
        self.digest = _digest("bytes", 257, 256)
        self.dtype = token_dtype(self.vocab_size)
        self.token_bytes_V = np.array([1] * 256 + [0], np.int64)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(self.dtype)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: np.ndarray) -> str:
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """A `tokenizer.json`. end_of_document: the token that ends a document, as it stands in the file.

    vocab_size is the largest id plus one. Truncation and padding of the file are switched off, and
    no special tokens are added. content: the file's bytes.
    """

    kind = "huggingface"

    def __init__(self, *, path: str, end_of_document: str):
        import tokenizers

        self.content = content = _read(path)
        try:
            specification = strict_json.loads(content)
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises plain Exception for most faults of the file
            raise _bad_file(
                path, f"not a tokenizer.json: {str(error)[:SAID]}", help="give the file that tokenizers' `save` wrote"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        special = {index for index, token in added.items() if token.special}
        if end_of_document not in vocabulary:
            names = ", ".join(sorted(added[index].content for index in special)[:20])
            raise _bad_file(
                path, f"it has no token `{end_of_document}`", help=f"name its end-of-document token, one of: {names}"
            )
        self.end_of_document_name = end_of_document
        self.end_of_document = int(vocabulary[end_of_document])
        self.vocab_size = max(vocabulary.values()) + 1
        if self.vocab_size > MAX_VOCAB:
            raise _bad_file(path, f"its largest id is {self.vocab_size - 1}", help="ids up to 2^24 are possible")
        self.dtype = token_dtype(self.vocab_size)
        self.digest = _digest("huggingface", hashlib.sha256(content).hexdigest(), end_of_document)
        self.token_bytes_V = np.zeros(self.vocab_size, np.int64)
        byte_level = _uses(specification.get("decoder"), "ByteLevel")
        for token, index in vocabulary.items():
            if index in special or index == self.end_of_document:
                continue
            plain = index in added
            self.token_bytes_V[index] = _bytes_of(token, byte_level=byte_level and not plain, plain=plain)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [self._checked(np.array(encoding.ids, self.dtype)) for encoding in encodings]

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        if (ids == self.end_of_document).any():
            raise ConfigError(
                Diagnostic(
                    code="N0231",
                    message=f"text was encoded to the end-of-document token `{self.end_of_document_name}`",
                    help="mark it as special in the tokenizer.json, or name another token",
                )
            )
        return ids

    def decode(self, ids: np.ndarray) -> str:
        return self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=True)


def _uses(decoder: Any, kind: str) -> bool:
    if not isinstance(decoder, dict):
        return False
    parts = decoder.get("decoders")
    return decoder.get("type") == kind or (isinstance(parts, list) and any(_uses(part, kind) for part in parts))


def _bytes_of(token: str, *, byte_level: bool, plain: bool) -> int:
    """Bytes of text behind a token's spelling in the vocabulary.

    Byte-level vocabularies spell each byte as one character (GPT-2's alphabet); SentencePiece's spell
    a space as U+2581 and a lone byte as <0xNN>; an added token is spelt as the text it stands for.
    """
    if byte_level:
        return len(token)
    if plain:
        return len(token.encode("utf-8"))
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
        return 1
    return len(token.replace("\u2581", " ").encode("utf-8"))


# The patterns that split text before the merges. They are part of the encodings' definition, as
# published in tiktoken's openai_public.py; a test compares them with the installed tiktoken.
_LETTERS_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LETTERS_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PATTERNS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
    "cl100k": (
        r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
        r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
    ),
    "o200k": "|".join(
        [
            rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTERS_UPPER}*{_LETTERS_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTERS_UPPER}+{_LETTERS_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    ),
}
# Published encodings leave a gap between their ranks and <|endoftext|>; ranks of other sizes have none.
PUBLISHED_END_OF_TEXT = {("gpt2", 50_256): 50_256, ("cl100k", 100_256): 100_257, ("o200k", 199_998): 199_999}


class TiktokenTokenizer:
    """Ranks in tiktoken's text format: a line for each token, base64 of its bytes, a space, its rank.

    pattern: "gpt2", "cl100k" or "o200k". <|endoftext|> ends a document; its id is the published one
    for the published rank files, else the number of ranks. vocab_size is that id plus one.
    """

    kind = "tiktoken"

    def __init__(self, *, path: str, pattern: str):
        import tiktoken

        content = _read(path)
        ranks = _parse_ranks(path, content)
        self.end_of_document = PUBLISHED_END_OF_TEXT.get((pattern, len(ranks)), len(ranks))
        self.vocab_size = self.end_of_document + 1
        self.dtype = token_dtype(self.vocab_size)
        self.digest = _digest("tiktoken", hashlib.sha256(content).hexdigest(), pattern, self.end_of_document)
        self.token_bytes_V = np.zeros(self.vocab_size, np.int64)
        for token, rank in ranks.items():
            self.token_bytes_V[rank] = len(token)
        self._encoding = tiktoken.Encoding(
            self.digest, pat_str=PATTERNS[pattern], mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": self.end_of_document},
        )  # fmt: skip

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._encoding.encode_ordinary(text), self.dtype)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: np.ndarray) -> str:
        ids = np.asarray(ids)
        return self._encoding.decode(ids[ids != self.end_of_document].tolist(), errors="replace")


def _parse_ranks(path: str | Path, content: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    form = "each line is base64 of the token's bytes, a space and its rank, ranks ascending from 0"
    for number, line in enumerate(content.splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        try:
            if len(fields) != 2 or not re.fullmatch(rb"[0-9]{1,8}", fields[1]):
                raise ValueError
            token, rank = base64.b64decode(fields[0], validate=True), int(fields[1])
        except (ValueError, binascii.Error) as error:
            raise _bad_file(path, "not a line of tiktoken ranks", line=number, help=form) from error
        if not token or token in ranks or rank != len(ranks):
            raise _bad_file(path, f"rank {rank} is out of order or its token is there twice", line=number, help=form)
        ranks[token] = rank
    if len(ranks) >= MAX_VOCAB:
        raise _bad_file(path, f"it has {len(ranks)} ranks", help="fewer than 2^24 are possible")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise _bad_file(path, f"byte {missing[0]:#04x} has no rank, so not every text can be encoded", help=form)
    return ranks
