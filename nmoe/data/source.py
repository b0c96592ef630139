"""A source of tokens: one long row of them, with the facts that give the numbers a meaning.

The layout of every source is the same. A document is its end-of-document token followed by the
tokens of its text:

    [EOD] text text text [EOD] text text [EOD] ...

so the first token of each document is predicted from an EOD, an EOD predicts "this text is over",
and the row read again from its start after its end is a valid row too. An EOD never stands inside
a document's text: tokenizers encode text that spells a special token as ordinary text.
"""

import hashlib
from collections.abc import Iterable
from typing import Protocol

import numpy as np

from nmoe.data.tokenizer import Tokenizer
from nmoe.errors import fail


class TokenSource(Protocol):
    """What the mixture and the evaluation read.

    digest: SHA-256 (hex) that names the tokens, their order and the tokenizer.
    tokenizer_digest: SHA-256 (hex) that names the tokenizer alone.
    token_bytes_V: int64, the bytes of text that each id stands for; 0 for special ids.
    document_starts: int64, ascending positions of the EOD that opens each document.
    """

    @property
    def digest(self) -> str: ...
    @property
    def tokenizer_digest(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def end_of_document(self) -> int: ...
    @property
    def token_bytes_V(self) -> np.ndarray: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def document_starts(self) -> np.ndarray: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens [start, stop) as a fresh int64 array; 0 <= start <= stop <= num_tokens."""
        ...


class MemorySource:
    """Documents tokenised into memory; a TokenSource.

    digest = SHA-256("nmoe tokens 1\\n" + tokenizer digest + "\\n" + every token as little-endian uint32).
    Raises RunError where there is no document.
    """

    def __init__(self, documents: Iterable[str], tokenizer: Tokenizer):
        pieces: list[np.ndarray] = []
        starts: list[int] = []
        position = 0
        opening = np.array([tokenizer.end_of_document], tokenizer.dtype)
        for text in documents:
            tokens = tokenizer.encode(text)
            starts.append(position)
            pieces += [opening, tokens]
            position += 1 + len(tokens)
        if not pieces:
            raise fail("N0200", "there is no document to tokenise", help="give at least one text")
        self._tokens = np.concatenate(pieces)
        self.document_starts = np.array(starts, np.int64)
        self.tokenizer_digest = tokenizer.digest
        self.vocab_size = tokenizer.vocab_size
        self.end_of_document = tokenizer.end_of_document
        self.token_bytes_V = tokenizer.token_bytes_V
        self.num_tokens = position
        hasher = hashlib.sha256(f"nmoe tokens 1\n{tokenizer.digest}\n".encode("ascii"))
        hasher.update(self._tokens.astype("<u4").tobytes())
        self.digest = hasher.hexdigest()

    def read(self, start: int, stop: int) -> np.ndarray:
        check_range(start, stop, self.num_tokens)
        return self._tokens[start:stop].astype(np.int64)


def check_range(start: int, stop: int, num_tokens: int) -> None:
    """Raise ValueError unless 0 <= start <= stop <= num_tokens; a slice would clip in silence."""
    if not 0 <= start <= stop <= num_tokens:
        raise ValueError(f"tokens [{start}, {stop}) of a source of {num_tokens}")
