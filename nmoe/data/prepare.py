"""Text to shards: `nmoe data prepare`.

One thread reads the inputs in order and cuts them into batches; threads decode and tokenise them
(the tokenizers' libraries work without the interpreter's lock); this thread appends the results in
the order of the inputs. So the shards are the same bytes for any number of workers.

The output directory holds `train` and, if documents are held out, `heldout`, and `prepare.json`
until everything is done. That journal is written whenever a shard is full and every 64 MiB of text,
after the data it speaks of are on the disk. After a kill the same command reads the inputs again up
to the journal's place, without tokenising them, compares their SHA-256 with the journal's, and goes
on; the result is the same bytes as without the kill.

A document is held out by its number (every N-th) or by its content (a fraction, chosen by the
SHA-256 of its text, so that equal documents always go to the same side).
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from nmoe.data import journal
from nmoe.data.documents import Batch, Record, kind, read_batches
from nmoe.data.manifest import Manifest
from nmoe.data.tokenizer import Tokenizer
from nmoe.data.writer import ShardWriter
from nmoe.errors import ConfigError, Diagnostic, RunError, fail

JOURNAL_BYTES = 2**26


@attrs.frozen(kw_only=True)
class Request:
    """What decides the output beside the inputs. heldout_every and heldout_fraction exclude each other."""

    separator: bytes | None = None
    jsonl_field: str = "text"
    shard_tokens: int = 2**28
    heldout_every: int | None = None
    heldout_fraction: float | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        held = self.heldout_every is not None or self.heldout_fraction is not None
        return ("train", "heldout") if held else ("train",)

    def digest(self, tokenizer: Tokenizer) -> str:
        parts = [
            "nmoe prepare 1", tokenizer.digest, None if self.separator is None else self.separator.hex(),
            self.jsonl_field, self.shard_tokens, self.heldout_every,
            None if self.heldout_fraction is None else self.heldout_fraction.hex(),
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode("ascii")).hexdigest()


@attrs.frozen(kw_only=True)
class Progress:
    """disk_bytes of total_bytes of the inputs are done; resumed_bytes of them in an earlier attempt."""

    disk_bytes: int
    total_bytes: int
    resumed_bytes: int
    documents: int
    tokens: int
    shards: int
    shard_finished: bool


@attrs.frozen(kw_only=True)
class _Encoded:
    """A batch's documents: tokens of all, laid out as [EOD] text ..., and a row for each document."""

    tokens: np.ndarray
    starts: np.ndarray
    text_bytes: np.ndarray
    altered: np.ndarray
    share: np.ndarray  # where the text's SHA-256 lies between 0 and 1
    empty: int


@attrs.frozen(kw_only=True)
class Outcome:
    """The manifests by part; empty: documents without text, which were left out."""

    manifests: dict[str, Manifest]
    empty_documents: int


def prepare(
    files: list[Path],
    output: Path,
    tokenizer: Tokenizer,
    request: Request,
    *,
    workers: int,
    progress: Callable[[Progress], None] | None = None,
) -> Outcome:
    """Tokenise `files` into shards below `output`, or continue where an earlier call was stopped.

    workers: threads that tokenise; they do not change the output.
    Raises ConfigError N0260 where output holds something else, RunError N0253 (text that is not
    UTF-8 or not JSON), N0261 (nothing to train on or to hold out), N0262 (the unfinished data or the
    inputs are not as they were), N0263 (the disk), and what reading the inputs raises.
    """
    try:
        with _locked(output):
            return _Preparation(files, output, tokenizer, request, progress).run(workers)
    except OSError as error:
        raise fail(
            "N0263", f"writing failed: {error.strerror or error}", place=str(error.filename or output),
            help="make room or mend the cause, then run the same command again to continue",
        ) from error  # fmt: skip


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    """One preparation at a time: a lock that the system takes back when the process ends."""
    if output.exists() and not output.is_dir():
        raise _occupied(output, "the output is not a directory")
    output.mkdir(parents=True, exist_ok=True)
    directory = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _occupied(output, "another `nmoe data prepare` works here") from error
        yield
    finally:
        os.close(directory)


def _occupied(output: Path, message: str) -> ConfigError:
    way_out = "choose another directory with -o, or remove this one"
    return ConfigError(Diagnostic(code="N0260", message=message, path=str(output), help=way_out))


class _Preparation:
    def __init__(
        self, files: list[Path], output: Path, tokenizer: Tokenizer, request: Request,
        progress: Callable[[Progress], None] | None,
    ):  # fmt: skip
        self.files, self.output, self.tokenizer, self.request = files, output, tokenizer, request
        self.progress = progress
        self.total_bytes = sum(path.stat().st_size for path in files)
        self.inputs = hashlib.sha256()
        self.documents = self.empty = self.next_batch = self.resumed_bytes = self.unrecorded = 0
        self.resume_at, self.resume_inputs = 0, ""
        states: dict[str, Any] = dict.fromkeys(request.splits)
        stored = self._read_journal()
        if stored and stored["next_batch"]:
            states = stored["splits"]
            self.resume_at, self.resume_inputs = stored["next_batch"], stored["inputs_sha256"]
            self.documents, self.empty = stored["documents"], stored["empty"]
        self.writers = {
            split: ShardWriter(output / split, tokenizer, shard_tokens=request.shard_tokens, state=states[split])
            for split in request.splits
        }

    def _read_journal(self) -> dict[str, Any] | None:
        if not (self.output / journal.NAME).exists():
            found = list(self.output.iterdir())
            if found:
                raise _occupied(self.output, f"the directory is not empty: it holds `{sorted(found)[0].name}`")
            self._write_journal(dict.fromkeys(self.request.splits), "")
            return None
        request = self.request.digest(self.tokenizer)
        stored = journal.read(
            self.output, request=request, splits=self.request.splits, item_bytes=self.tokenizer.dtype.itemsize
        )
        if stored["request"] != request:
            raise _occupied(self.output, "an unfinished preparation with other options or another tokenizer lies here")
        return stored

    def _write_journal(self, splits: dict[str, Any], inputs_sha256: str) -> None:
        fields = {
            "request": self.request.digest(self.tokenizer),
            "next_batch": self.next_batch,
            "inputs_sha256": inputs_sha256,
            "documents": self.documents,
            "empty": self.empty,
            "splits": splits,
        }
        journal.write(self.output, fields)

    def run(self, workers: int) -> Outcome:
        pool = ThreadPoolExecutor(workers, thread_name_prefix="nmoe-tokenise")
        waiting: deque[tuple[Batch, str, Future[_Encoded]]] = deque()
        try:
            for batch in self._batches():
                future = pool.submit(_encode, batch, self.tokenizer, self.request)
                waiting.append((batch, self.inputs.hexdigest(), future))
                if len(waiting) > 2 * workers:
                    self._take(*waiting.popleft())
            while waiting:
                self._take(*waiting.popleft())
            return self._finish()
        finally:
            pool.shutdown(cancel_futures=True)
            for writer in self.writers.values():
                writer.close()

    def _batches(self) -> Iterator[Batch]:
        """The batches that are still to be done; those before them are read, compared and passed over."""
        skipped = 0
        for batch in read_batches(self.files, self.request.separator):
            for record in batch.records:
                self.inputs.update(len(record.content).to_bytes(8, "little") + record.content)
            if skipped < self.resume_at:
                skipped += 1
                self.resumed_bytes = batch.disk_bytes
                if skipped == self.resume_at:
                    self._compare_inputs()
                continue
            yield batch
        if skipped < self.resume_at:
            self._compare_inputs()

    def _compare_inputs(self) -> None:
        if self.inputs.hexdigest() != self.resume_inputs:
            raise fail(
                "N0262", "the inputs are not those that the unfinished data were made of", place=str(self.output),
                help="restore the inputs, or remove the output directory and prepare it again",
            )  # fmt: skip
        self.next_batch = self.resume_at

    def _take(self, batch: Batch, inputs_sha256: str, future: Future[_Encoded]) -> None:
        """Append one batch, in its turn; write the journal where it is due."""
        encoded = future.result()
        heldout = self._held_out(encoded)
        finished = 0
        for split, writer in self.writers.items():
            finished += _append(writer, encoded, heldout if split == "heldout" else ~heldout)
        self.documents += len(encoded.starts)
        self.empty += encoded.empty
        self.next_batch += 1
        self.unrecorded += sum(len(record.content) for record in batch.records)
        if finished or self.unrecorded >= JOURNAL_BYTES:
            self.unrecorded = 0
            self._write_journal({split: w.checkpoint() for split, w in self.writers.items()}, inputs_sha256)
        if self.progress is not None:
            self.progress(
                Progress(
                    disk_bytes=batch.disk_bytes,
                    total_bytes=self.total_bytes,
                    resumed_bytes=self.resumed_bytes,
                    documents=self.documents,
                    tokens=sum(w.num_tokens for w in self.writers.values()),
                    shards=sum(len(w.shards) for w in self.writers.values()),
                    shard_finished=finished > 0,
                )
            )

    def _held_out(self, encoded: _Encoded) -> np.ndarray:
        count, request = len(encoded.starts), self.request
        if request.heldout_every is not None:
            return (np.arange(self.documents + 1, self.documents + count + 1) % request.heldout_every) == 0
        if request.heldout_fraction is not None:
            return encoded.share < request.heldout_fraction
        return np.zeros(count, bool)

    def _finish(self) -> Outcome:
        for split, writer in self.writers.items():
            if not writer.num_documents:
                raise fail(
                    "N0261", f"no document is left for `{split}`", place=str(self.output),
                    help="give more documents or another share to hold out; remove the output directory first",
                )  # fmt: skip
        manifests = {split: writer.finish() for split, writer in self.writers.items()}
        (self.output / journal.NAME).unlink()
        return Outcome(manifests=manifests, empty_documents=self.empty)


def _append(writer: ShardWriter, encoded: _Encoded, chosen: np.ndarray) -> int:
    """Append the chosen documents of a batch; how many shards that finished."""
    if not chosen.any():
        return 0
    lengths = np.diff(encoded.starts, append=len(encoded.tokens))
    kept = lengths[chosen]
    return writer.append(
        encoded.tokens if chosen.all() else encoded.tokens[np.repeat(chosen, lengths)],
        np.cumsum(kept) - kept,
        text_bytes=int(encoded.text_bytes[chosen].sum()),
        altered=int(encoded.altered[chosen].sum()),
    )


def _encode(batch: Batch, tokenizer: Tokenizer, request: Request) -> _Encoded:
    """Decode and tokenise one batch; runs in a worker thread."""
    texts = [_text(batch, record, request.jsonl_field) for record in batch.records]
    filled = [text for text in texts if text]
    encoded = tokenizer.encode_batch(filled)
    opening = np.array([tokenizer.end_of_document], tokenizer.dtype)
    pieces = [piece for ids in encoded for piece in (opening, ids)]
    lengths = np.array([1 + len(ids) for ids in encoded], np.int64)
    raw = [text.encode("utf-8") for text in filled]
    text_bytes = np.array([len(content) for content in raw], np.int64)
    stand_for = np.array([tokenizer.token_bytes_V[ids].sum() for ids in encoded], np.int64)
    shares = [_share(content) for content in raw] if request.heldout_fraction is not None else []
    return _Encoded(
        tokens=np.concatenate(pieces) if pieces else opening[:0],
        starts=np.cumsum(lengths) - lengths,
        text_bytes=text_bytes,
        altered=text_bytes != stand_for,
        share=np.array(shares, np.float64),
        empty=len(texts) - len(filled),
    )


def _share(content: bytes) -> float:
    """A number in [0, 1) that the content decides: the head of its SHA-256."""
    return int.from_bytes(hashlib.sha256(content).digest()[:6], "big") / 2**48


def _text(batch: Batch, record: Record, field: str) -> str:
    """The text of a record; RunError N0253 names the file and the byte or line."""
    try:
        text = record.content.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"{batch.path}, byte {record.offset + error.start}"
        raise _bad_text("the text is not UTF-8", place) from error
    if kind(batch.path) != "jsonl":
        return text
    place = f"{batch.path}:{record.line}"
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _bad_text(f"the line is not JSON: {error}", place) from error
    if not isinstance(tree, dict) or not isinstance(tree.get(field), str):
        raise _bad_text(f"the line is no object with a string `{field}`", place)
    value: str = tree[field]
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _bad_text(f"`{field}` holds a lone surrogate, which has no UTF-8", place) from error
    return value


def _bad_text(message: str, place: str) -> RunError:
    return fail(
        "N0253", message, place=place, help="mend the file, then run the same command again to continue",
    )  # fmt: skip
