"""Files of runs and of data with other bytes or other values, through all that nmoe does when it reads them.

Where a seal or a digest would stop a change at the door, one of two is sealed again, so that what is behind is reached.
"""

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from nmoe.data.manifest import BLOCK_BYTES
from tests.torture import mutate, trainings
from tests.torture.campaign import Tally
from tests.torture.fuzz_case import Count
from tests.torture.fuzz_scene import File, of_data, of_run, resealed, restored, sealed_plan

JSON_WORDS = (
    b"null",
    b"true",
    b"-1",
    b"1e9",
    b"NaN",
    b"[]",
    b"{}",
    b'""',
    b'"x":1,',
    b"\\ud800",
    b"\\u0000",
    b"9" * 400,
)
TABLES = {"blocks.bin": "blocks_sha256", "documents.bin": "documents_sha256", "token_bytes.bin": "token_bytes_sha256"}


def of_runs(name: str, count: int, directory: Path) -> Tally:
    """HEAD, manifest, events, owner, plan, environment, ledger."""
    files = of_run(directory)
    shares = {"HEAD": 1, "checkpoint manifest": 5, "events": 3, "owner": 2, "plan": 1, "environment": 1, "ledger": 5}
    return _cases(name, count, files, shares)


def of_datas(name: str, count: int, directory: Path) -> Tally:
    """Shards with their manifest and tables, the journal of a preparation, documents, tokenizers."""
    files = of_data(directory)
    shares = {"shards' manifest": 5, "journal": 3, "JSON lines": 2, "packed text": 1, "tokenizer.json": 4, "ranks": 3,
              "shard_000000.bin": 1, "blocks.bin": 1, "documents.bin": 2, "token_bytes.bin": 1}  # fmt: skip
    return _cases(name, count, files, shares)


def whole(name: str, count: int, directory: Path) -> Tally:
    """`nmoe train`, by its command line, of a run with a changed file: a status of its own, and no traceback."""
    files = of_run(directory, "output.stop_after_step=2")
    found, draws = Count(), random.Random(name)
    straight = directory / "straight"
    order = ["HEAD", "checkpoint manifest", "events", "owner", "plan", "environment", "ledger"]
    for number in range(count):
        which = order[number % len(order)]
        file, disk = files[which], directory / "disk"
        shutil.copytree(straight, disk)
        _moved(disk)
        bent = attrs.evolve(file, path=disk / file.path.relative_to(straight))
        SPECIAL.get(which, _changed)(draws, bent)
        found.case(f"{name} {number}, {which}", lambda disk=disk: trainings.attempt(disk), _of_training)  # type: ignore[misc]
        shutil.rmtree(disk)
    return found.tally()


def _moved(disk: Path) -> None:
    """The run's plan.json says where it is, as if it had been begun there."""
    plan = disk / "run" / "plan.json"
    plan.write_text(plan.read_text().replace(str(disk.with_name("straight")), str(disk)))
    sealed_plan(plan)


def _of_training(ended: trainings.Ended) -> Iterator[str]:
    if ended.ends[0] not in ("exit 0", "exit 1", "exit 2") or "Traceback" in ended.said[0]:
        yield f"{ended.ends[0]}: {ended.said[0][-1500:]}"


def _cases(name: str, count: int, files: dict[str, File], shares: dict[str, int]) -> Tally:
    found, draws = Count(), random.Random(name)
    order = [one for one, share in shares.items() for _ in range(share)]
    for number in range(count):
        which = order[number % len(order)]
        file = files[which]
        with restored(file.around):
            SPECIAL.get(which, _changed)(draws, file)
            found.case(f"{name} {number}, {which}", file.read, file.judge)
    return found.tally()


def _changed(draws: random.Random, file: File) -> None:
    """Other bytes, or other values."""
    content = file.path.read_bytes()
    if file.kind == "bytes" or draws.random() < 0.4:
        words = () if file.kind == "bytes" else JSON_WORDS
        file.path.write_bytes(mutate.of_bytes(draws, content, words))
    elif file.kind == "json":
        file.path.write_bytes(mutate.of_json(draws, json.loads(content), indent=file.indent))
    elif file.kind == "lines":
        lines = content.splitlines(keepends=True)
        at = draws.randrange(len(lines))
        lines[at] = mutate.of_json(draws, json.loads(lines[at])) + draws.choice((b"\n", b"\n", b"\r\n", b"", b"\n\n"))
        if draws.random() < 0.1:
            lines.insert(draws.randrange(len(lines) + 1), draws.choice(lines))
        file.path.write_bytes(b"".join(lines))
    else:
        lines = content.splitlines(keepends=True)
        at = draws.randrange(len(lines))
        token, rank = lines[at].split()
        numbered = b"%s %d\n" % (token, int(rank) + draws.choice((-1, 1, 10**6)))
        twice, spoilt = b"%s %s %s\n" % (token, rank, rank), b"!%s %s\n" % (token, rank)
        lines[at] = draws.choice((numbered, twice, spoilt, b"%s\n" % rank, b" %s\n" % rank, b"\n", lines[0]))
        file.path.write_bytes(b"".join(lines))


def _plan(draws: random.Random, file: File) -> None:
    """A plan.json changed as it lies there; or changed, with the digests of what it then says."""
    _changed(draws, file)
    if draws.random() < 0.6:
        sealed_plan(file.path)


def _checkpoint(draws: random.Random, file: File) -> None:
    """A manifest changed as it lies there; or changed and sealed again, with the HEAD that names it."""
    if draws.random() < 0.25:
        _changed(draws, file)
        return
    step, fields = int(file.path.parent.name[5:]), json.loads(file.path.read_bytes())
    if draws.random() < 0.3:
        tensor = draws.choice(list(fields["tensors"].values()))
        tensor["shape"] = draws.choice(
            ([2**60], [2**30, 2**30], [-1, -1], [0], [], [1] * 20, [2**24, 2**24], [1.0], ["1"], [True])
        )
        tensor["slices"] = draws.choice(([], tensor["slices"], ["0" * 64] * 3, ["../" * 21 + "x"], [None]))
    else:
        where = draws.choice(("state", "tensors", "environment", "identity"))
        if where == "identity":
            fields = mutate.of_value(draws, fields)
        else:
            fields[where] = mutate.of_value(draws, fields[where])
    resealed(file.path.parent.parent, step, fields)


def _shards(draws: random.Random, file: File) -> None:
    """A manifest changed as it lies there, or in the canonical form of what it then says."""
    if draws.random() < 0.3:
        _changed(draws, file)
        return
    tree = json.loads(file.path.read_bytes())
    if draws.random() < 0.4:
        huge = draws.choice((2**53 - 1, 2**53, 2**60, 2**63, 2**64, 10**30, 0, -1))
        tree["num_tokens"], tree["shards"] = huge, [{**tree["shards"][0], "num_tokens": huge}]
        tree["num_documents"] = draws.choice((huge, 1))
    else:
        tree = mutate.of_value(draws, tree)
    file.path.write_bytes(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode("ascii"))


def _journal(draws: random.Random, file: File) -> None:
    """A journal changed as it lies there; or changed, and sealed again."""
    if draws.random() < 0.4:
        _changed(draws, file)
        return
    fields = json.loads(file.path.read_bytes())
    del fields["seal"]
    place = draws.choice((fields, fields["splits"], fields["splits"]["train"], fields["splits"]["train"]["shard"]))
    bent = mutate.of_value(draws, place)
    if isinstance(bent, dict):
        place.clear()
        place.update(bent)
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    file.path.write_text(json.dumps({**fields, "seal": hashlib.sha256(text.encode()).hexdigest()}))


def _table(draws: random.Random, file: File) -> None:
    """The bytes of a shard or a table, or numbers that no writer writes; with the digests of what is there, or not."""
    content = file.path.read_bytes()
    if file.path.name in ("documents.bin", "token_bytes.bin") and draws.random() < 0.7:
        width = "<u8" if file.path.name == "documents.bin" else "<u4"
        row = np.frombuffer(content, width).copy()
        for _ in range(draws.choice((1, 1, 2, 3))):
            top = np.iinfo(row.dtype).max
            row[draws.randrange(len(row))] = draws.choice(
                (0, 1, top, top // 2, top // 2 + 1, top // 2 + 2, top // 4 + 1, len(row))
            )
        bent = (np.sort(row)[::-1] if draws.random() < 0.1 else row).tobytes()
    else:
        bent = mutate.of_bytes(draws, content)
    file.path.write_bytes(bent)
    if draws.random() < 0.85:
        _seal_shards(file.path.parent)


def _seal_shards(directory: Path) -> None:
    """The manifest of what lies in the directory, whatever that is."""
    path = directory / "manifest.json"
    tree = json.loads(path.read_bytes())
    blocks = []
    for shard in tree["shards"]:
        content = (directory / shard["file"]).read_bytes()
        shard |= {"num_tokens": len(content) // 2, "sha256": hashlib.sha256(content).hexdigest()}
        blocks += [
            hashlib.sha256(content[at : at + BLOCK_BYTES]).digest() for at in range(0, len(content), BLOCK_BYTES)
        ]
    tree["num_tokens"] = sum(shard["num_tokens"] for shard in tree["shards"])
    tree["num_documents"] = (directory / "documents.bin").stat().st_size // 8
    if (directory / "blocks.bin").read_bytes()[:1]:
        (directory / "blocks.bin").write_bytes(b"".join(blocks))
    for name, key in TABLES.items():
        place = tree["tokenizer"] if name == "token_bytes.bin" else tree
        place[key] = hashlib.sha256((directory / name).read_bytes()).hexdigest()
    path.write_bytes(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode("ascii"))


def _ledger(draws: random.Random, file: File) -> None:
    """Bytes of a Parquet file; or one that is whole, of rows that no writer writes."""
    if draws.random() < 0.5:
        file.path.write_bytes(
            mutate.of_bytes(draws, file.path.read_bytes(), (b"PAR1", b"\x15\x04", b"\xff" * 5, b"\x7f" * 8))
        )
        return
    table = draws.choice(ROWS)(draws, pq.read_table(file.path))
    checked = draws.random() < 0.9
    with pa.OSFile(str(file.path), "wb") as sink:
        pq.write_table(table, sink, write_page_checksum=checked, write_statistics=False,
                       compression=draws.choice(("zstd", "none", "snappy", "gzip")),
                       use_dictionary=draws.random() < 0.5)  # fmt: skip


def _with_column(table: Any, name: str, values: Any) -> Any:
    return table.set_column(table.schema.get_field_index(name), table.schema.field(name), values)


def _strange_value(draws: random.Random, table: Any) -> Any:
    name = draws.choice(table.column_names)
    kind, values = table.schema.field(name).type, table.column(name).to_pylist()
    some = {
        "string": ["", "\x00", "é", "x" * 5000, "../x", "\x1b[31m"],
        "double": [float("nan"), float("inf"), -0.0, 1e308],
    }
    at = draws.randrange(len(values))
    values[at] = draws.choice(some.get(str(kind), [0, -1, 2**31 - 1, -(2**31)]))
    if draws.random() < 0.3:
        values = [values[at]] * len(values)
    return _with_column(table, name, pa.array(values, kind))


def _invalid_text(draws: random.Random, table: Any) -> Any:
    name = draws.choice(("run", "lineage", "name", "label"))
    values = [(value or "").encode() for value in table.column(name).to_pylist()]
    values[draws.randrange(len(values))] = draws.choice((b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80"))
    array = pa.array(values, pa.binary())
    return _with_column(table, name, pa.StringArray.from_buffers(len(values), *array.buffers()[1:]))


def _other_type(draws: random.Random, table: Any) -> Any:
    name = draws.choice(table.column_names)
    kind = draws.choice(
        (pa.string(), pa.int8(), pa.int64(), pa.float32(), pa.large_string(), pa.bool_(), pa.binary(), pa.null())
    )
    at = table.schema.get_field_index(name)
    try:
        return table.set_column(at, pa.field(name, kind), table.column(name).cast(kind))
    except (pa.ArrowException, ValueError):
        return table.set_column(
            at, pa.field(name, pa.list_(pa.int32())), pa.array([[1]] * len(table), pa.list_(pa.int32()))
        )


def _other_rows(draws: random.Random, table: Any) -> Any:
    doubled = pa.concat_tables([table, table.slice(draws.randrange(len(table)), 1)])
    nulls = pa.array([None] * len(table), table.schema.field("time_ns").type)
    at = table.schema.get_field_index("time_ns")
    without = table.set_column(at, pa.field("time_ns", pa.int64(), nullable=True), nulls)
    return draws.choice((doubled, without, table.slice(0, 0), table.drop_columns([draws.choice(table.column_names)]),
                         table.select(table.column_names[::-1])))  # fmt: skip


ROWS: tuple[Callable[[random.Random, Any], Any], ...] = (
    _strange_value,
    _strange_value,
    _invalid_text,
    _other_type,
    _other_rows,
)
SPECIAL: dict[str, Callable[[random.Random, File], None]] = {
    "checkpoint manifest": _checkpoint, "plan": _plan, "shards' manifest": _shards, "journal": _journal,
    "ledger": _ledger,
    **dict.fromkeys(("shard_000000.bin", "blocks.bin", "documents.bin", "token_bytes.bin"), _table),
}  # fmt: skip
KINDS = {"run": of_runs, "data": of_datas, "train": whole}
