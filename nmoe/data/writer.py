"""Writing a shard directory so that a kill at any moment costs little and damages nothing.

The writer only appends. A shard grows as `shard_NNNNNN.bin.part` and gets its name when it is full
and on the disk; document offsets grow in `documents.bin.part`; the manifest is written last, under
a temporary name. `checkpoint` makes everything so far durable and returns what a new writer needs
to go on: `restore` verifies every finished shard, cuts the unfinished files back to the recorded
length, compares them, and removes what is newer. The bytes of the result do not depend on how
often that happened, nor on the sizes of the pieces that were appended.
"""

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nmoe.data.manifest import BLOCK_BYTES, Manifest, ShardEntry, shard_name
from nmoe.data.tokenizer import Tokenizer
from nmoe.errors import RunError, fail

CHUNK = 64 * BLOCK_BYTES


class _File:
    """A file that grows, with its SHA-256 and those of its blocks.

    With a state (of `state()`), the file is cut back to that length and compared first.
    """

    def __init__(self, path: Path, state: dict[str, Any] | None = None):
        self.path = path
        self.size = 0
        self.hasher = hashlib.sha256()
        self._block = hashlib.sha256()
        self._blocks: list[bytes] = []
        if state is None:
            self.file: BinaryIO = path.open("wb")
            return
        if not path.exists():
            raise damaged(path)
        self.file = path.open("r+b")
        while self.size < state["bytes"]:
            content = self.file.read(min(CHUNK, state["bytes"] - self.size))
            if not content:
                raise damaged(path)
            self._take(content)
        if self.hasher.hexdigest() != state["sha256"]:
            raise damaged(path)
        self.file.truncate(self.size)

    def append(self, content: bytes) -> None:
        self.file.write(content)
        self._take(content)

    def _take(self, content: bytes) -> None:
        self.hasher.update(content)
        view = memoryview(content)
        while view:
            room = BLOCK_BYTES - self.size % BLOCK_BYTES
            piece, view = view[:room], view[room:]
            self._block.update(piece)
            self.size += len(piece)
            if self.size % BLOCK_BYTES == 0:
                self._blocks.append(self._block.digest())
                self._block = hashlib.sha256()

    def blocks(self) -> list[bytes]:
        """SHA-256 of every block, the last one perhaps shorter."""
        return self._blocks + ([self._block.digest()] if self.size % BLOCK_BYTES else [])

    def state(self) -> dict[str, Any]:
        """Everything is on the disk; its length and SHA-256."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return {"bytes": self.size, "sha256": self.hasher.hexdigest()}

    def finish(self) -> None:
        """Put it on the disk and give it its name, without `.part`."""
        self.state()
        self.file.close()
        self.path.rename(self.path.with_suffix(""))


def damaged(path: Path) -> RunError:
    return fail(
        "N0262", "a file of the unfinished data is not as it was left", place=str(path),
        help="remove the output directory and prepare it again",
    )  # fmt: skip


class ShardWriter:
    """Appends documents to one shard directory. shard_tokens: tokens of every shard but the last."""

    def __init__(
        self, directory: Path, tokenizer: Tokenizer, *, shard_tokens: int, state: dict[str, Any] | None = None
    ):
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.tokenizer, self.shard_tokens = directory, tokenizer, shard_tokens
        self.shards: list[ShardEntry] = []
        self._blocks: list[bytes] = []
        self.num_documents = self.num_tokens = self.text_bytes = self.altered_documents = 0
        if state is None:
            for path in [*directory.glob("shard_*"), *directory.glob("documents.bin*")]:
                path.unlink()
            self._shard = _File(self._part())
            self._documents = _File(directory / "documents.bin.part")
        else:
            self._restore(state)

    def _part(self) -> Path:
        return self.directory / f"{shard_name(len(self.shards))}.part"

    def append(self, tokens: np.ndarray, starts: np.ndarray, *, text_bytes: int, altered: int) -> int:
        """Append whole documents: tokens, the positions in them where documents begin, and counts.

        Returns how many shards this has finished.
        """
        self._documents.append((starts + self.num_tokens).astype("<u8").tobytes())
        self.num_documents += len(starts)
        self.num_tokens += len(tokens)
        self.text_bytes += text_bytes
        self.altered_documents += altered
        finished = 0
        while len(tokens):
            if self._shard.size == self.shard_tokens * self.tokenizer.dtype.itemsize:
                self._finish_shard()
                self._shard = _File(self._part())
                finished += 1
            room = self.shard_tokens - self._shard.size // self.tokenizer.dtype.itemsize
            self._shard.append(tokens[:room].tobytes())
            tokens = tokens[room:]
        return finished

    def _finish_shard(self) -> None:
        self._shard.finish()
        count = self._shard.size // self.tokenizer.dtype.itemsize
        self.shards.append(ShardEntry(num_tokens=count, sha256=self._shard.hasher.hexdigest()))
        self._blocks += self._shard.blocks()

    def checkpoint(self) -> dict[str, Any]:
        """Everything so far is on the disk; the returned table is what `state` takes."""
        return {
            "shards": [{"num_tokens": entry.num_tokens, "sha256": entry.sha256} for entry in self.shards],
            "shard": self._shard.state(),
            "documents": self._documents.state(),
            "num_documents": self.num_documents,
            "num_tokens": self.num_tokens,
            "text_bytes": self.text_bytes,
            "altered_documents": self.altered_documents,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        for entry in state["shards"]:
            finished = _File(
                self.directory / shard_name(len(self.shards)),
                {"bytes": entry["num_tokens"] * self.tokenizer.dtype.itemsize, "sha256": entry["sha256"]},
            )
            finished.file.close()
            self._blocks += finished.blocks()
            self.shards.append(ShardEntry(**entry))
        # A file that got its name after the record was made is the record's unfinished one.
        for part in (self._part(), self.directory / "documents.bin.part"):
            if part.with_suffix("").exists():
                part.with_suffix("").replace(part)
        kept = {shard_name(i) for i in range(len(self.shards))} | {self._part().name}
        for path in self.directory.glob("shard_*"):
            if path.name not in kept:
                path.unlink()
        (self.directory / "manifest.json").unlink(missing_ok=True)
        self._shard = _File(self._part(), state["shard"])
        self._documents = _File(self.directory / "documents.bin.part", state["documents"])
        self.num_documents, self.num_tokens = state["num_documents"], state["num_tokens"]
        self.text_bytes, self.altered_documents = state["text_bytes"], state["altered_documents"]

    def finish(self) -> Manifest:
        """Name the last files and write the tables and the manifest; the directory can be opened."""
        self._finish_shard()
        self._documents.finish()
        tokenizer = self.tokenizer
        token_bytes = tokenizer.token_bytes_V.astype("<u4").tobytes()
        blocks = b"".join(self._blocks)
        manifest = Manifest(
            dtype=tokenizer.dtype.name,
            num_tokens=self.num_tokens,
            num_documents=self.num_documents,
            text_bytes=self.text_bytes,
            altered_documents=self.altered_documents,
            shards=tuple(self.shards),
            blocks_sha256=hashlib.sha256(blocks).hexdigest(),
            documents_sha256=self._documents.hasher.hexdigest(),
            token_bytes_sha256=hashlib.sha256(token_bytes).hexdigest(),
            tokenizer_kind=tokenizer.kind,
            tokenizer_digest=tokenizer.digest,
            vocab_size=tokenizer.vocab_size,
            end_of_document=tokenizer.end_of_document,
        )
        for name, content in (
            ("blocks.bin", blocks), ("token_bytes.bin", token_bytes), ("manifest.json", manifest.encode())
        ):  # fmt: skip
            write_whole(self.directory / name, content)
        return manifest

    def close(self) -> None:
        """Let go of the files; what was not checkpointed is lost."""
        self._shard.file.close()
        self._documents.file.close()


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file in one piece: temporary name, fsync, rename, fsync of the directory."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
