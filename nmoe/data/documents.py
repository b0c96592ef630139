"""Documents out of text files, in one fixed order, with the place of each for error messages.

    NAME.txt      one document; with a separator, one for each part between separators
    NAME.jsonl    one document for each line that is not blank: the text of one key of its object
    .gz and .xz after either are unpacked on the fly

A directory stands for the files below it in the order of their relative paths. Files are read as a
stream in pieces; nothing is trusted about their size, and one document may have 256 MiB. This module
does not decode text: bytes go to the threads that do.
"""

import gzip
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import attrs

from nmoe.errors import ConfigError, Diagnostic, RunError, fail

MAX_DOCUMENT_BYTES = 2**28
BATCH_BYTES = 2**20
BATCH_RECORDS = 2**14
PIECE = 2**20


@attrs.frozen
class Record:
    """The bytes of a text or of a JSON line. offset: where it begins in the unpacked file; line: from
    1, or 0 for a text."""

    content: bytes
    offset: int
    line: int


@attrs.frozen(kw_only=True)
class Batch:
    """Records of one file, in order. disk_bytes: bytes of input, as they lie on the disk, up to here."""

    path: Path
    records: list[Record]
    disk_bytes: int


def find_files(inputs: list[Path]) -> tuple[list[Path], list[Path]]:
    """(files to read in their order, files found in directories whose kind is not known).

    Raises ConfigError N0250 for an input that is not there, of unknown kind, or without a file.
    """
    files: list[Path] = []
    ignored: list[Path] = []
    for path in inputs:
        if path.is_dir():
            inside = sorted((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.relative_to(path).as_posix())
            known = [p for p in inside if kind(p)]
            if not known:
                raise _bad_input(path, "the directory holds no .txt or .jsonl file")
            files += known
            ignored += [p for p in inside if not kind(p)]
        elif not path.exists():
            raise _bad_input(path, "there is no such file or directory")
        elif not path.is_file() or not kind(path):
            raise _bad_input(path, "not a file of a known kind")
        else:
            files.append(path)
    return files, ignored


def _bad_input(path: Path, message: str) -> ConfigError:
    way_out = "give .txt or .jsonl files, .gz or .xz after it if packed, or directories of them"
    return ConfigError(Diagnostic(code="N0250", message=message, path=str(path), help=way_out))


def kind(path: Path) -> str:
    """ "txt", "jsonl", or "" for any other file."""
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in (".gz", ".xz"):
        suffixes = suffixes[:-1]
    return suffixes[-1][1:] if suffixes and suffixes[-1] in (".txt", ".jsonl") else ""


def read_batches(files: list[Path], separator: bytes | None) -> Iterator[Batch]:
    """Every record of every file, in batches of about 1 MiB that never span two files.

    Raises RunError N0251 where a file cannot be read or unpacked, N0252 where a document is too large.
    """
    before = 0
    for path in files:
        try:
            with path.open("rb") as disk, _unpacked(path, disk) as stream:
                records: list[Record] = []
                size = 0
                for record in _records(path, stream, separator):
                    records.append(record)
                    size += len(record.content)
                    if size >= BATCH_BYTES or len(records) == BATCH_RECORDS:
                        yield Batch(path=path, records=records, disk_bytes=before + disk.tell())
                        records, size = [], 0
                before += disk.tell()
                if records:
                    yield Batch(path=path, records=records, disk_bytes=before)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise fail(
                "N0251", f"the input cannot be read: {error}", place=str(path),
                help="check the file; then run the same command again to continue",
            ) from error  # fmt: skip


def _unpacked(path: Path, disk: BinaryIO) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=disk, mode="rb")  # type: ignore[return-value]
    if path.suffix == ".xz":
        return lzma.LZMAFile(disk, mode="rb")  # type: ignore[return-value]
    return disk


def _records(path: Path, stream: BinaryIO, separator: bytes | None) -> Iterator[Record]:
    if kind(path) == "jsonl":
        parts = _parts(path, stream, b"\n")
        numbered = (Record(content, offset, line) for line, (content, offset) in enumerate(parts, start=1))
        return (record for record in numbered if record.content.strip())
    return (Record(content, offset, 0) for content, offset in _parts(path, stream, separator))


def _parts(path: Path, stream: BinaryIO, separator: bytes | None) -> Iterator[tuple[bytes, int]]:
    """The parts between separators with their offsets, without an empty one at the end; None: the whole."""
    buffer, offset, searched = bytearray(), 0, 0
    while piece := stream.read(PIECE):
        buffer += piece
        begin = 0
        while separator is not None and (end := buffer.find(separator, max(begin, searched))) >= 0:
            yield bytes(buffer[begin:end]), offset + begin
            begin = searched = end + len(separator)
        del buffer[:begin]
        offset += begin
        searched = max(len(buffer) - len(separator) + 1, 0) if separator is not None else 0
        if len(buffer) > MAX_DOCUMENT_BYTES:
            raise _too_large(path, offset)
    if buffer:
        yield bytes(buffer), offset


def _too_large(path: Path, offset: int) -> RunError:
    return fail(
        "N0252", "a document has more than 256 MiB", place=f"{path}, byte {offset}",
        help="cut it into documents with --separator, or give it as .jsonl",
    )  # fmt: skip
