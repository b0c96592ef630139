"""Reading the ledger through DuckDB.

Whatever shows metrics reads them here, from the files themselves. Superseded files lie one level
deeper than the pattern reaches, so a reader sees the rows of the run as it stands.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import attrs
import duckdb

from nmoe.errors import fail
from nmoe.metrics import ledger


@attrs.frozen(kw_only=True)
class Row:
    """One row of the ledger; see nmoe.metrics.ledger.COLUMNS and nmoe.metrics.schema."""

    run: str
    lineage: str
    attempt: int
    step: int
    tokens_seen: int
    time_ns: int
    name: str
    layer: int | None
    expert: int | None
    rank: int | None
    label: str | None
    value: float | None


def read_rows(directory: Path, *, names: Collection[str] | None = None) -> list[Row]:
    """Rows of one run, by step and then as they were added; only those of `names` if given.

    directory: `<metrics_dir>/<run>`. Empty for a run without metrics. RunError N0403 if a file cannot be read.
    """
    files = list(ledger.files(directory).values())
    if not files:
        return []
    for path in files:
        ledger.require_file(path)
    paths = [str(path) for path in files]
    columns = ", ".join(field.name for field in ledger.COLUMNS)
    where = "" if names is None else "where list_contains(?, name)"
    with duckdb.connect(":memory:", config={"threads": 1}) as connection:

        def read(some: list[str]) -> list[tuple[Any, ...]]:
            return connection.execute(
                f"select {columns} from read_parquet(?, file_row_number = true) {where} order by step, file_row_number",
                [some] if names is None else [some, list(names)],
            ).fetchall()

        try:
            found = read(paths)
        except duckdb.Error as cause:
            raise fail(
                "N0403",
                f"the metrics cannot be read: {str(cause).splitlines()[0]}",
                place=next((path for path in paths if _fails(read, path)), str(directory)),
                help="move the file away; its rows are lost, the training is not touched",
            ) from cause
    names_of_columns = [field.name for field in ledger.COLUMNS]
    return [Row(**dict(zip(names_of_columns, row, strict=True))) for row in found]


def _fails(read: Callable[[list[str]], object], path: str) -> bool:
    try:
        read([path])
    except duckdb.Error:
        return True
    return False


def last_value(directory: Path, name: str, *, label: str | None = None) -> float | None:
    """The newest value of a metric in one run, None if it has none; `label` picks one where there are several."""
    rows = [row for row in read_rows(directory, names=[name]) if label is None or row.label == label]
    return rows[-1].value if rows else None


def connect(metrics_dir: Path) -> duckdb.DuckDBPyConnection:
    """A connection with the view `metrics`: all rows of all runs below a metrics directory.

    The view follows the files: rows that are committed later appear in later queries.
    RunError N0409 if there is no file yet.
    """
    pattern = metrics_dir / "*" / "step_*.parquet"
    if next(metrics_dir.glob("*/step_*.parquet"), None) is None:
        raise fail("N0409", "there are no metrics yet", place=str(metrics_dir), help="train a step first")
    connection = duckdb.connect(":memory:")
    quoted = str(pattern).replace("'", "''")
    connection.execute(f"create view metrics as select * from read_parquet('{quoted}')")
    return connection
