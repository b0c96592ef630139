"""Where a run's metrics go: rows are added during a step, and the step is committed whole.

A committed step is handed to one thread, which puts its rows into an in-memory DuckDB table (whose
types and constraints they must meet), takes them out as Arrow and writes one durable file, all in
one transaction: rows leave the table when the file stands. Training does not wait for the disk,
unless it is a whole queue ahead. `flush` waits until everything committed is durable; the checkpoint
calls it before HEAD moves, so that what HEAD names has its ledger.

Nothing is swallowed: a failure of the thread is raised by the next commit, flush or close, and no
step after it is written, so that the files never have a hole.
"""

import queue
import threading
from pathlib import Path
from types import TracebackType

import duckdb
import pyarrow as pa  # type: ignore[import-untyped]

from nmoe.errors import RunError, fail
from nmoe.metrics import ledger, schema

QUEUE = 64
"""Steps that may wait for the disk."""

CHECKED_ON_OPENING = 8
"""Newest files that are read in full when a run's ledger is opened."""

ROWS = pa.schema([ledger.COLUMNS.field(name) for name in ("name", "layer", "expert", "rank", "label", "value")])

TABLE = """
create table step_rows (
    run varchar not null, lineage varchar not null, attempt integer not null,
    step bigint not null, tokens_seen bigint not null, time_ns bigint not null,
    name varchar not null, layer integer, expert integer, rank integer, label varchar, value double
)
"""

Row = tuple[str, int | None, int | None, int | None, str | None, float | None]
Step = tuple[int, int, int, list[Row]]


class Sink:
    """The writer of one run's ledger; one at a time, by the owner of the run.

    directory: the metrics directory of all runs. run, lineage, attempt: what each row says of its origin.
    Opening removes temporary files of a killed writer and checks the newest files in full.
    Raises RunError N0402 (disk), N0403 (damaged file).
    """

    def __init__(self, directory: Path, *, run: str, lineage: str, attempt: int):
        if not run or run.startswith(".") or "/" in run or "\0" in run:
            raise fail(
                "N0408", f"`{run}` cannot name a directory of metrics", place=str(directory), help="rename the run"
            )
        self.directory = Path(directory) / run
        self.run = run
        self.lineage = lineage
        self.attempt = attempt
        self._rows: list[Row] = []
        self._keys: set[tuple[object, ...]] = set()
        self._failure: BaseException | None = None
        self._closed = False
        try:
            ledger.make_directory(self.directory)
            for path in ledger.torn_files(self.directory):
                path.unlink()
            found = ledger.files(self.directory)
        except OSError as cause:
            raise _disk("open", self.directory, cause) from cause
        for step, path in list(found.items())[-CHECKED_ON_OPENING:]:
            ledger.read(path, step=step, run=run)
        self.last_step = max(found, default=0)
        self._queue: queue.Queue[Step | None] = queue.Queue(maxsize=QUEUE)
        self._thread = threading.Thread(target=self._write_steps, name="metrics", daemon=True)
        self._thread.start()

    def set_aside_after(self, step: int) -> int:
        """Moves every file past `step` to superseded/attempt_K/, K being the attempt that wrote it.

        Called when a run goes on from `step`, before anything is committed. Returns how many were moved.
        """
        self.flush()
        past = {s: path for s, path in ledger.files(self.directory).items() if s > step}
        touched = {self.directory}
        try:
            for s, path in past.items():
                attempt = ledger.read(path, step=s, run=self.run).column("attempt")[0].as_py()
                target = self._free(f"attempt_{attempt}", path.name)
                path.rename(target)
                touched |= {target.parent, target.parent.parent}
            for parent in touched:
                ledger.sync(parent)
        except OSError as cause:
            raise _disk("set aside files in", self.directory, cause) from cause
        self.last_step = max(ledger.files(self.directory), default=0)
        return len(past)

    def add(
        self,
        name: str,
        value: float | None,
        *,
        layer: int | None = None,
        expert: int | None = None,
        rank: int | None = None,
        label: str | None = None,
    ) -> None:
        """One row of the step under way; columns as the metric's schema entry says. RunError N0401, N0404."""
        metric = schema.lookup(name)
        schema.check(metric, {"layer": layer, "expert": expert, "rank": rank, "label": label}, value)
        key = (name, layer, expert, rank, label)
        if key in self._keys:
            raise fail("N0404", f"`{name}` was added twice", place=f"{key[1:]}", help="add each row once a step")
        self._keys.add(key)
        self._rows.append((name, layer, expert, rank, label, None if value is None else float(value)))

    def commit(self, step: int, tokens_seen: int, time_ns: int) -> None:
        """Ends the step: its rows will be one file. RunError N0404 for a step that is there, or an empty one."""
        self._raise_failure()
        if step <= self.last_step:
            raise fail(
                "N0404",
                f"step {step} cannot be committed after step {self.last_step}",
                place=str(self.directory),
                help="set aside the files past the step that the run goes on from",
            )
        if not self._rows:
            raise fail("N0404", f"step {step} has no rows", place=str(self.directory), help="add rows, then commit")
        self._queue.put((step, tokens_seen, time_ns, self._rows))
        self.last_step = step
        self._rows = []
        self._keys = set()

    def flush(self) -> None:
        """Waits until every committed step is a durable file; raises what went wrong."""
        self._queue.join()
        self._raise_failure()

    def close(self) -> None:
        """Flushes and ends the thread. RunError N0404 if rows were added and never committed."""
        self._end()
        self._raise_failure()
        if self._rows:
            raise fail(
                "N0404",
                f"{len(self._rows)} rows were added and never committed",
                place=str(self.directory),
                help="commit the step before closing",
            )

    def __enter__(self) -> "Sink":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        # The body's failure is the one to report; rows of its unfinished step go with it.
        self._end()
        if self._failure is not None and self._failure is not error:
            error.add_note(f"the metrics failed too: {self._failure}")

    def _end(self) -> None:
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            self._thread.join()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _free(self, attempt: str, name: str) -> Path:
        """A path below superseded/ that no file has: an attempt that was itself cut off twice keeps both."""
        count = 0
        while True:
            parent = self.directory / "superseded" / (f"{attempt}.{count}" if count else attempt)
            if not (parent / name).exists():
                parent.mkdir(parents=True, exist_ok=True)
                return parent / name
            count += 1

    def _write_steps(self) -> None:
        """The thread: takes steps in order until None; after a failure it only empties the queue."""
        buffer: duckdb.DuckDBPyConnection | None = None
        while True:
            item = self._queue.get()
            try:
                if item is None:
                    return
                if self._failure is None:
                    if buffer is None:
                        buffer = duckdb.connect(":memory:", config={"threads": 1})
                        buffer.execute(TABLE)
                    self._write(buffer, item)
            except BaseException as error:  # kept, and raised by the next call of the owner
                self._failure = error
            finally:
                self._queue.task_done()

    def _write(self, buffer: duckdb.DuckDBPyConnection, item: Step) -> None:
        step, tokens_seen, time_ns, rows = item
        columns = zip(zip(*rows, strict=True), ROWS, strict=True)
        added = pa.table([pa.array(column, type=field.type) for column, field in columns], schema=ROWS)
        buffer.register("added", added)
        buffer.begin()
        buffer.execute(
            "insert into step_rows select ?, ?, ?, ?, ?, ?, * from added",
            [self.run, self.lineage, self.attempt, step, tokens_seen, time_ns],
        )
        content = ledger.encode(buffer.sql("from step_rows").to_arrow_table())
        path = self.directory / ledger.file_name(step)
        try:
            ledger.write(path, content)
        except OSError as cause:
            raise _disk("write", path, cause) from cause
        buffer.execute("delete from step_rows")
        buffer.commit()
        buffer.unregister("added")


def _disk(action: str, path: Path, cause: OSError) -> RunError:
    return fail(
        "N0402",
        f"cannot {action} the metrics: {(cause.strerror or str(cause)).lower()}",
        place=str(path),
        help="make room or give the right to write there; the run goes on from its last checkpoint",
    )
