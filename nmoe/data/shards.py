"""Reading token shards: memory-mapped, and never a token that has not been checked.

Opening checks the manifest, that exactly its shards are there, every file's size, and the SHA-256
of the two small tables. The tokens themselves are checked when they are read: every shard is cut
into blocks of 128 KiB whose SHA-256 stand in `blocks.bin` (0.02 % of the data, named by the
manifest), and the first read of a block in a process hashes it first. So a changed or reordered
shard stops the run at the first window that touches it, in a terabyte as in a megabyte, and the
price is one hash of each byte that training visits, in the prefetch thread. Directories of up to
256 MiB are checked whole when they are opened, so that small data fail before the first step.
`verify` reads everything, at any size, and checks what no single window can show: that the
documents begin where `documents.bin` says, and that text bytes add up. Opening and `verify` tell
of every file that is not as it was, not of the first alone.
"""

import hashlib
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from nmoe.data.manifest import BLOCK_BYTES, Manifest, invalid, read_manifest, shard_name
from nmoe.data.source import check_range
from nmoe.errors import Diagnostic, RunError, fail

WHOLE_CHECK_BYTES = 2**28
RESTORE = "restore the directory from its origin, or make it again with `nmoe data prepare`"


class ShardSource:
    """A directory of shards as a TokenSource; digest is the SHA-256 of its manifest.

    Raises RunError: N0240 no manifest, N0241 manifest not valid, N0242 a file is missing, of another
    size or not named by the manifest, N0243 a file's content is not what the manifest says.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.manifest: Manifest = read_manifest(self.directory / "manifest.json")
        manifest = self.manifest
        self.digest = manifest.digest
        self.tokenizer_digest = manifest.tokenizer_digest
        self.vocab_size = manifest.vocab_size
        self.end_of_document = manifest.end_of_document
        self.num_tokens = manifest.num_tokens
        self._check_files()
        hashes = self._table("blocks.bin", manifest.blocks_sha256)
        self._block_hashes = [hashes[i : i + 32] for i in range(0, len(hashes), 32)]
        self._checked = np.zeros(len(self._block_hashes), bool)
        token_bytes = self._table("token_bytes.bin", manifest.token_bytes_sha256)
        self.token_bytes_V = np.frombuffer(token_bytes, "<u4").astype(np.int64)
        self._first_block = np.concatenate([[0], np.cumsum(manifest.blocks())])
        self._ends = np.cumsum([entry.num_tokens for entry in manifest.shards])
        self._starts = self._ends - [entry.num_tokens for entry in manifest.shards]
        self._maps: dict[int, np.ndarray] = {}
        self._document_starts: np.ndarray | None = None
        if self.num_tokens * manifest.item_bytes <= WHOLE_CHECK_BYTES:
            sizes = enumerate(entry.num_tokens for entry in manifest.shards)
            _raise(found for index, size in sizes for found in _faults(self._check_blocks, index, 0, size))

    def _check_files(self) -> None:
        expected, faults = self.manifest.files(), []
        for name, size in expected.items():
            try:
                status = (self.directory / name).stat()
            except OSError:
                faults.append(self._odd(f"`{name}` is missing", RESTORE))
                continue
            if not stat.S_ISREG(status.st_mode) or status.st_size != size:
                faults.append(
                    self._odd(f"`{name}` has {status.st_size} bytes where the manifest says {size}", RESTORE)
                )
        way_out = "move it away if it does not belong to the data, else " + RESTORE
        for name in sorted(path.name for path in self.directory.glob("shard_*") if path.name not in expected):
            faults.append(self._odd(f"`{name}` is not in the manifest", way_out))
        _raise(faults)

    def _odd(self, message: str, help: str) -> Diagnostic:
        return Diagnostic(code="N0242", message=message, place=str(self.directory), help=help)

    def _table(self, name: str, sha256: str) -> bytes:
        content = (self.directory / name).read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise self._changed(name)
        return content

    def _changed(self, name: str, where: str = "") -> RunError:
        return fail(
            "N0243", f"the content of `{name}` is not what the manifest says{where}",
            place=str(self.directory), help=RESTORE,
        )  # fmt: skip

    @property
    def document_starts(self) -> np.ndarray:
        """int64, ascending; read and checked at the first use."""
        if self._document_starts is None:
            content = self._table("documents.bin", self.manifest.documents_sha256)
            starts = np.frombuffer(content, "<u8")  # compared as they are: signed, the largest would be negative
            if starts[0] != 0 or (starts[1:] <= starts[:-1]).any() or starts[-1] >= self.num_tokens:
                raise invalid(self.directory / "documents.bin", "document offsets do not ascend from 0")
            self._document_starts = starts.astype(np.int64)
        return self._document_starts

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens [start, stop) as int64, every block that holds one of them checked."""
        check_range(start, stop, self.num_tokens)
        tokens = np.empty(stop - start, np.int64)
        first = int(np.searchsorted(self._ends, start, side="right"))
        done = 0
        for index in range(first, len(self._ends)):
            here = start + done - int(self._starts[index])
            count = min(stop, int(self._ends[index])) - start - done
            if count <= 0:
                break
            self._check_blocks(index, here, here + count)
            tokens[done : done + count] = self._map(index)[here : here + count]
            done += count
        return tokens

    def _map(self, index: int) -> np.ndarray:
        if index not in self._maps:
            dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
            self._maps[index] = np.memmap(self.directory / shard_name(index), dtype, mode="r")
        return self._maps[index]

    def _check_blocks(self, index: int, start: int, stop: int) -> None:
        """Hash the blocks of tokens [start, stop) of a shard that this process has not hashed yet."""
        per_block = BLOCK_BYTES // self.manifest.item_bytes
        for block in range(start // per_block, -(-stop // per_block)):
            row = int(self._first_block[index]) + block
            if self._checked[row]:
                continue
            content = self._map(index)[block * per_block : (block + 1) * per_block]
            if hashlib.sha256(content.tobytes()).digest() != self._block_hashes[row]:
                raise self._changed(shard_name(index), f", bytes {block * BLOCK_BYTES} and after")
            if int(content.max()) >= self.vocab_size:
                raise invalid(self.directory / shard_name(index), "an id is outside the vocabulary")
            self._checked[row] = True

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read every byte and check all that the manifest says. progress(tokens done, tokens in all).

        Raises RunError like opening does.
        """
        faults = _faults(lambda: self.document_starts)
        text_bytes = opened = 0
        for index, before in enumerate(self._starts.tolist()):
            try:
                for content, first in self._read_shard(index):
                    found = np.flatnonzero(content == self.end_of_document) + before + first
                    if not faults and not np.array_equal(found, self.document_starts[opened : opened + len(found)]):
                        faults += self._changed("documents.bin", f" (tokens {before + first} and after)").diagnostics
                    opened += len(found)
                    text_bytes += int(self.token_bytes_V[content].sum())
                    if progress is not None:
                        progress(before + first + len(content), self.num_tokens)
            except RunError as error:
                faults += error.diagnostics
        _raise(faults)
        if opened != len(self.document_starts):
            raise self._changed("documents.bin", f" ({opened} documents found)")
        if self.manifest.altered_documents == 0 and text_bytes != self.manifest.text_bytes:
            raise invalid(self.directory / "manifest.json", f"text_bytes is not the {text_bytes} found")

    def _read_shard(self, index: int) -> Iterator[tuple[np.ndarray, int]]:
        """(tokens, where they begin in the shard), piece by piece; block by block and whole they must be as written."""
        step = 64 * BLOCK_BYTES // self.manifest.item_bytes
        entry, hasher, blocks = self.manifest.shards[index], hashlib.sha256(), int(self._first_block[index])
        tokens_T = self._map(index)
        for first in range(0, entry.num_tokens, step):
            content = tokens_T[first : first + step]
            self._checked[blocks + first * self.manifest.item_bytes // BLOCK_BYTES :][:64] = False
            self._check_blocks(index, first, first + len(content))
            hasher.update(content.tobytes())
            yield content, first
        if hasher.hexdigest() != entry.sha256:
            raise self._changed(shard_name(index))


def _faults(check: Callable[..., object], *given: int) -> list[Diagnostic]:
    """What a check finds."""
    try:
        check(*given)
    except RunError as error:
        return list(error.diagnostics)
    return []


def _raise(faults: Iterable[Diagnostic]) -> None:
    """All of them, or nothing."""
    found = list(faults)
    if found:
        raise RunError(found)


def open_shards(directory: str | Path) -> ShardSource:
    """The shards that `nmoe data prepare` wrote to `directory`; see ShardSource."""
    return ShardSource(directory)
