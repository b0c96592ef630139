"""The ledger's files: how one step's rows become a Parquet file, and how a file is checked.

A run's metrics are `<metrics_dir>/<run>/step_XXXXXXXX.parquet`, one file a step. A file is written
under a name that starts with a dot, fsynced, renamed, and the directory is fsynced: at every moment
each name that a reader sees is a whole step.

Every page carries a CRC-32, which Arrow verifies on reading (DuckDB's own writer leaves it out).
The CRC covers pages; what stands around them is covered by comparing what is read with what a
file of that name must hold: the exact columns and types, one run, one step. Statistics are left out:
a reader would skip rows by a flipped minimum without ever reading them.
"""

import io
import os
import re
import stat
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from nmoe.errors import Diagnostic, RunError, fail

COLUMNS = pa.schema(
    [
        pa.field("run", pa.string(), nullable=False),
        pa.field("lineage", pa.string(), nullable=False),
        pa.field("attempt", pa.int32(), nullable=False),
        pa.field("step", pa.int64(), nullable=False),
        pa.field("tokens_seen", pa.int64(), nullable=False),
        pa.field("time_ns", pa.int64(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("layer", pa.int32()),
        pa.field("expert", pa.int32()),
        pa.field("rank", pa.int32()),
        pa.field("label", pa.string()),
        pa.field("value", pa.float64()),
    ]
)
"""The ledger's columns. time_ns is Unix time; value is null for text metrics."""

LARGEST = 1 << 28
"""Bytes that one step's file may have."""

PIECE = 1 << 8
"""Rows that are read at once."""

_NAME = re.compile(r"step_(\d{8,})\.parquet")
_TORN = re.compile(r"\.step_\d{8,}\.parquet\.tmp")


def file_name(step: int) -> str:
    return f"step_{step:08d}.parquet"


def files(directory: Path) -> dict[int, Path]:
    """A run's files by step, in order; superseded ones, being elsewhere, are not among them."""
    found: dict[int, Path] = {}
    if directory.is_dir():
        for path in directory.iterdir():
            matched = _NAME.fullmatch(path.name)
            if matched and path.name == file_name(int(matched[1])):
                found[int(matched[1])] = path
    return dict(sorted(found.items()))


def torn_files(directory: Path) -> list[Path]:
    """Temporary files that a killed writer left."""
    return sorted(path for path in directory.iterdir() if _TORN.fullmatch(path.name))


def encode(table: pa.Table) -> bytes:
    """A step's rows as a Parquet file: page checksums, no statistics."""
    buffer = io.BytesIO()
    pq.write_table(
        table.cast(COLUMNS), buffer, write_page_checksum=True, write_statistics=False, compression="zstd"
    )
    return buffer.getvalue()


def write(path: Path, content: bytes) -> None:
    """Makes `path` hold `content`, durably and all at once; it must not exist. OSError as it comes."""
    if path.exists():
        raise FileExistsError(17, "file exists", str(path))
    temporary = path.with_name(f".{path.name}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.rename(path)
    sync(path.parent)


def sync(directory: Path) -> None:
    """Makes a directory's names durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Makes `path` and what is missing above it, each name durable in its parent. OSError as it comes.

    As in `nmoe.checkpoint.disk`: what a killed process has made may not be durable yet.
    """
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)
    elif os.access(path.parent, os.R_OK | os.W_OK | os.X_OK):
        sync(path.parent)


def read(path: Path, *, step: int, run: str) -> pa.Table:
    """One file, every page checked; RunError N0403 if it is not that step of that run, whole."""
    require_file(path)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = _whole(path, file)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as cause:
        raise _damaged(path, f"cannot be read: {str(cause).splitlines()[0] if str(cause) else cause!r}") from cause
    if not table.schema.equals(COLUMNS):
        raise _damaged(path, "has other columns than the ledger's")
    if table.num_rows == 0:
        raise _damaged(path, "has no rows")
    for column, expected in (("step", step), ("run", run)):
        found = table.column(column).unique().to_pylist()
        if found != [expected]:
            raise _damaged(path, f"holds {column} {', '.join(map(str, found[:3]))} where its name says {expected}")
    for column in ("lineage", "attempt", "tokens_seen", "time_ns"):
        if (several := len(table.column(column).unique())) != 1:
            raise _damaged(path, f"has {several} values of {column} in one step")
    least = {"attempt": 1, "tokens_seen": 0, "time_ns": 0}
    if wrong := [f"{column} {value}" for column, at_least in least.items()
                 if (value := table.column(column)[0].as_py()) is not None and value < at_least]:
        raise _damaged(path, f"holds {', '.join(wrong)}")
    if any(table.column(field.name).null_count for field in COLUMNS if not field.nullable):
        raise _damaged(path, "lacks values that every row has")
    keys = table.select(["name", "layer", "expert", "rank", "label"])
    if keys.group_by(keys.column_names).aggregate([]).num_rows != table.num_rows:
        raise _damaged(path, "has a row twice")
    return table


def require_file(path: Path) -> None:
    """RunError N0403 unless that is a regular file of a size that a step may have: no pipe is waited for."""
    try:
        status = path.stat(follow_symlinks=False)
    except OSError as cause:
        raise _damaged(path, f"cannot be read: {(cause.strerror or str(cause)).lower()}") from cause
    if not stat.S_ISREG(status.st_mode):
        raise _damaged(path, "is not a regular file")
    if status.st_size > LARGEST:
        raise _damaged(path, f"has {status.st_size} bytes, more than the {LARGEST} that a step may have")


def _whole(path: Path, file: pq.ParquetFile) -> pa.Table:
    """All rows, a piece at a time, every text UTF-8: some bytes of a file can claim more memory than there is."""
    pieces, size = [], 0
    for piece in file.iter_batches(batch_size=PIECE, use_threads=False):
        piece.validate(full=True)
        size += piece.nbytes
        if size > LARGEST:
            raise _damaged(path, f"unpacks to more than the {LARGEST} bytes that a step may have")
        pieces.append(piece)
    table = pa.Table.from_batches(pieces, file.schema_arrow)
    if table.num_rows != file.metadata.num_rows:
        raise _damaged(path, f"claims {file.metadata.num_rows} rows and has {table.num_rows}")
    return table


def verify(directory: Path) -> int:
    """Reads every file of a run's directory in full. Returns how many; RunError with all that are damaged."""
    faults: list[Diagnostic] = []
    found = files(directory)
    for step, path in found.items():
        try:
            read(path, step=step, run=directory.name)
        except RunError as error:
            faults.extend(error.diagnostics)
    if faults:
        raise RunError(faults)
    return len(found)


def _damaged(path: Path, what: str) -> RunError:
    return fail(
        "N0403",
        f"the metrics file `{path.name}` {what}",
        place=str(path),
        help="move the file away; its rows are lost, the training is not touched",
    )
