"""The manifest of a shard directory: what is in it, by content.

    DIR/manifest.json        this, in canonical JSON (sorted keys, no space); its SHA-256 names the data
    DIR/shard_000000.bin     tokens, little-endian uint16 or uint32, nothing else; and so on
    DIR/blocks.bin           SHA-256 (32 bytes) of every 128 KiB block of every shard, shard after shard
    DIR/documents.bin        little-endian uint64: the position of the token that opens each document
    DIR/token_bytes.bin      little-endian uint32: bytes of text behind each id

A manifest is data from outside: its size is limited, unknown, missing and doubled keys, numbers of
the wrong type or size and names other than the expected ones are refused before a file is opened,
and it must be the canonical text of what it says, so that one content has one digest.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from nmoe import strict_json
from nmoe.data import files
from nmoe.errors import RunError, fail

FORMAT = "nmoe-shards"
VERSION = 1
BLOCK_BYTES = 2**17
MAX_MANIFEST_BYTES = 2**28
MAX_SHARDS = 10**6
MAX_TOKENS = 2**53 - 1
MAX_VOCAB = 2**24
KINDS = ("bytes", "huggingface", "tiktoken")


@attrs.frozen(kw_only=True)
class ShardEntry:
    num_tokens: int
    sha256: str


@attrs.frozen(kw_only=True)
class Manifest:
    """text_bytes: UTF-8 bytes of the documents. altered_documents: those whose tokens stand for
    another number of bytes. The three digests are SHA-256 of the files of their names."""

    dtype: str
    num_tokens: int
    num_documents: int
    text_bytes: int
    altered_documents: int
    shards: tuple[ShardEntry, ...]
    blocks_sha256: str
    documents_sha256: str
    token_bytes_sha256: str
    tokenizer_kind: str
    tokenizer_digest: str
    vocab_size: int
    end_of_document: int

    @property
    def item_bytes(self) -> int:
        return np.dtype(self.dtype).itemsize

    def blocks(self) -> np.ndarray:
        """How many blocks each shard has (int64)."""
        sizes = np.array([entry.num_tokens for entry in self.shards], np.int64) * self.item_bytes
        return -(-sizes // BLOCK_BYTES)

    def files(self) -> dict[str, int]:
        """Every file of the directory beside the manifest, with its size in bytes."""
        sizes = {shard_name(i): entry.num_tokens * self.item_bytes for i, entry in enumerate(self.shards)}
        tables = {
            "blocks.bin": 32 * int(self.blocks().sum()),
            "documents.bin": 8 * self.num_documents,
            "token_bytes.bin": 4 * self.vocab_size,
        }
        return sizes | tables

    def encode(self) -> bytes:
        """The canonical text."""
        tree = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": self.dtype,
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "text_bytes": self.text_bytes,
            "altered_documents": self.altered_documents,
            "shards": [
                {"file": shard_name(i), "num_tokens": entry.num_tokens, "sha256": entry.sha256}
                for i, entry in enumerate(self.shards)
            ],
            "blocks_sha256": self.blocks_sha256,
            "documents_sha256": self.documents_sha256,
            "tokenizer": {
                "kind": self.tokenizer_kind,
                "digest": self.tokenizer_digest,
                "vocab_size": self.vocab_size,
                "end_of_document": self.end_of_document,
                "token_bytes_sha256": self.token_bytes_sha256,
            },
        }
        return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.encode()).hexdigest()


def shard_name(index: int) -> str:
    return f"shard_{index:06d}.bin"


def invalid(path: Path, message: str) -> RunError:
    return fail(
        "N0241",
        f"the manifest is not valid: {message}",
        place=str(path),
        help="restore the directory from its origin, or make it again with `nmoe data prepare`",
    )


def read_manifest(path: Path) -> Manifest:
    """Read and check `manifest.json`. Raises RunError N0240 (not there) or N0241 (not valid)."""
    try:
        content = files.read(path, limit=MAX_MANIFEST_BYTES)
    except OSError as error:
        inside = [split for split in ("train", "heldout") if (path.parent / split / path.name).is_file()]
        hint = f"name its part: {path.parent / inside[0]}" if inside else "make one with `nmoe data prepare`"
        cause = (error.strerror or str(error)).lower()
        raise fail("N0240", f"no shards here: {cause}", place=str(path), help=hint) from error
    if len(content) > MAX_MANIFEST_BYTES:
        raise invalid(path, "it is larger than 256 MiB")
    try:
        manifest = _structure(strict_json.loads(content))
    except ValueError as error:
        raise invalid(path, str(error)) from error
    if manifest.encode() != content:
        raise invalid(path, "it is not written in canonical form")
    return manifest


def _structure(tree: Any) -> Manifest:
    top = _table(
        tree, "the manifest",
        {"format", "version", "dtype", "num_tokens", "num_documents", "text_bytes", "altered_documents", "shards",
         "blocks_sha256", "documents_sha256", "tokenizer"},
    )  # fmt: skip
    if top["format"] != FORMAT or top["version"] != VERSION or isinstance(top["version"], bool):
        raise ValueError(f"format {top['format']!r} version {top['version']!r}; this nmoe reads {FORMAT} {VERSION}")
    tokenizer = _table(
        top["tokenizer"], "`tokenizer`", {"kind", "digest", "vocab_size", "end_of_document", "token_bytes_sha256"}
    )
    if tokenizer["kind"] not in KINDS:
        raise ValueError(f"tokenizer kind {tokenizer['kind']!r}")
    vocab_size = _count(tokenizer["vocab_size"], "vocab_size", 1, MAX_VOCAB)
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    if top["dtype"] != dtype:
        raise ValueError(f"dtype {top['dtype']!r} for {vocab_size} ids; it must be {dtype}")
    num_tokens = _count(top["num_tokens"], "num_tokens", 1, MAX_TOKENS)
    shards = tuple(_shards(top["shards"]))
    if sum(entry.num_tokens for entry in shards) != num_tokens:
        raise ValueError(f"the shards do not add up to num_tokens = {num_tokens}")
    num_documents = _count(top["num_documents"], "num_documents", 1, num_tokens)
    return Manifest(
        dtype=dtype,
        num_tokens=num_tokens,
        num_documents=num_documents,
        text_bytes=_count(top["text_bytes"], "text_bytes", 0, MAX_TOKENS),
        altered_documents=_count(top["altered_documents"], "altered_documents", 0, num_documents),
        shards=shards,
        blocks_sha256=_sha256(top["blocks_sha256"]),
        documents_sha256=_sha256(top["documents_sha256"]),
        token_bytes_sha256=_sha256(tokenizer["token_bytes_sha256"]),
        tokenizer_kind=tokenizer["kind"],
        tokenizer_digest=_sha256(tokenizer["digest"]),
        vocab_size=vocab_size,
        end_of_document=_count(tokenizer["end_of_document"], "end_of_document", 0, vocab_size - 1),
    )


def _shards(entries: Any) -> list[ShardEntry]:
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_SHARDS:
        raise ValueError(f"`shards` must be a list of 1 to {MAX_SHARDS} entries")
    shards = []
    for index, entry in enumerate(entries):
        fields = _table(entry, f"shard {index}", {"file", "num_tokens", "sha256"})
        if fields["file"] != shard_name(index):
            raise ValueError(f"shard {index} is called {str(fields['file'])[:80]!r}, not {shard_name(index)!r}")
        count = _count(fields["num_tokens"], f"num_tokens of shard {index}", 1, MAX_TOKENS)
        shards.append(ShardEntry(num_tokens=count, sha256=_sha256(fields["sha256"])))
    return shards


def _table(value: Any, name: str, keys: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not a table")
    for found, text in ((keys - value.keys(), "lacks"), (value.keys() - keys, "has the unknown key")):
        if found:
            raise ValueError(f"{name} {text} {sorted(found)[0][:80]!r}")
    return value


def _count(value: Any, name: str, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} must be an integer from {least} to {most}")
    return value


def _sha256(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError(f"{str(value)[:80]!r} is no SHA-256")
    return value
