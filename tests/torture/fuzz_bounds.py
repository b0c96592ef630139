"""Files that are too large, too deep, or declare more than there is; and pickles in the place of every file.

What is read must end within the alarm of HANG_S and within MEMORY more than the process had; a child of its own tries
each, under a limit of its address space, so that running out is a MemoryError and not the machine's end. A pickle must
be refused unread: were it read, it would leave a mark.
"""

import io
import json
import os
import pickle
import random
import resource
import signal
import socket
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch

from nmoe.checkpoint.format import object_path
from nmoe.errors import NmoeError
from nmoe.metrics import ledger
from nmoe.plan.resolve import resolve
from tests.torture.campaign import Tally
from tests.torture.fuzz_case import HANG_S, Count, nothing
from tests.torture.fuzz_scene import File, of_data, of_run, restored

MEMORY = 4 << 30
LARGE = 100 << 20
DEEP = 10_000


def bounds(name: str, count: int, directory: Path) -> Tally:
    """Every file of one kind of scene, in every monstrous form. count: of these at most, drawn if there are more."""
    files = _files(name, directory)
    for stream in ("JSON lines", "packed text"):
        files.pop(stream, None)  # text to be prepared may have any length, and takes its time
    cases = [(which, form) for which in files for form in FORMS]
    cases += [("ledger", form) for form in LEDGERS] if "ledger" in files else []
    cases += [("tokenizer.json", form) for form in TOKENIZERS] if "tokenizer.json" in files else []
    if count < len(cases):
        cases = [("config", one) for one in FORMS if "config" in files] + random.Random(name).sample(cases, count)
    found = Count()
    for which, form in cases:
        if (which, form) == ("config", "a pipe"):
            continue  # a config may come through one
        file = files[which]
        with restored(file.around):
            sample = file.path.read_bytes()
            file.path.unlink()
            MAKERS[form](file.path, sample)
            _apart(found, f"{which} is {form}", file)
    return found.tally()


def pickles(name: str, count: int, directory: Path) -> Tally:
    """Pickles of all protocols, torch's files and numpy's object arrays in the place of every file; `count` of them."""
    mark = directory / "mark"
    forms = _pickles(mark)
    pickle.loads(forms["a pickle of protocol 2"])
    assert mark.is_dir(), "a pickle that is read leaves its mark"
    mark.rmdir()
    files = _files(name, directory)
    cases = [(which, form) for which in files for form in forms]
    if count < len(cases):
        cases = random.Random(name).sample(cases, count)
    found = Count()
    for which, form in cases:
        file = files[which]

        def judge(answer: Any, which: str = which) -> Iterator[str]:
            if which != "environment":  # people alone read it: what is no record is none
                yield "accepted"

        with restored(file.around):
            file.path.write_bytes(forms[form])
            found.case(f"{which} is {form}", file.read, judge)
            if mark.exists():
                found.fault(f"{which} is {form}", "it was unpickled")
                mark.rmdir()
    return found.tally()


def _files(name: str, directory: Path) -> dict[str, File]:
    files = of_run(directory) if "run" in name else of_data(directory)
    if "run" in name:
        head, config = files["HEAD"], directory / "config.toml"
        manifest = json.loads(files["checkpoint manifest"].path.read_bytes())
        sha256 = manifest["tensors"]["router.bias/layers.0"]["slices"][0]
        stored = object_path(head.path.parent, sha256)
        config.write_text("[model]\n")
        files["object"] = attrs.evolve(head, path=stored, around=(*head.around, stored), judge=nothing)
        files["config"] = File(path=config, read=lambda: resolve(config), judge=nothing, kind="text", around=(config,))
    return files


def _apart(found: Count, what: str, file: File) -> None:
    """One case in a child of its own: how it ended, and the most memory that it had."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        said = _try(file)
        os.write(write_end, said.encode()[-4000:])
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        said = pipe.read()
    _, status, usage = os.wait4(child, 0)
    kind, _, text = said.partition(":")
    if os.waitstatus_to_exitcode(status) or kind not in ("accepted", "refused"):
        found.tracebacks += 1
        found.keep(f"{what}: {text or f'status {status}'}")
    else:
        found.accepted += kind == "accepted"
        found.refused += kind == "refused"
        if text:
            found.fault(what, text)
    if usage.ru_maxrss - before > MEMORY >> 10:
        found.fault(what, f"took {(usage.ru_maxrss - before) >> 10} MiB")


def _try(file: File) -> str:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # it ends the child, also one that waits inside a library
        signal.alarm(HANG_S)
        answer = file.read()
        return "accepted:" + "; ".join(file.judge(answer))
    except NmoeError as error:
        return "refused:" + ("a refusal of many words" if len(error.render()) > 1 << 20 else "")
    except BaseException:
        return "raised:" + traceback.format_exc()[-3000:]


def _filled(unit: bytes, head: bytes = b"", tail: bytes = b"") -> Callable[[Path, bytes], None]:
    def make(path: Path, sample: bytes) -> None:
        with path.open("wb") as file:
            file.write(head)
            piece = unit * ((1 << 20) // len(unit))
            for _ in range(LARGE // len(piece)):
                file.write(piece)
            file.write(tail)

    return make


def _text(content: bytes) -> Callable[[Path, bytes], None]:
    return lambda path, sample: path.write_bytes(content) and None


def _sparse(path: Path, sample: bytes) -> None:
    with path.open("wb") as file:
        file.write(sample)
        file.truncate(1 << 40)


def _socket(path: Path, sample: bytes) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket may have 108 bytes
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)
    os.chdir(here)


def _padded(path: Path, sample: bytes) -> None:
    with path.open("wb") as file:
        file.write(sample.rstrip() + b" " * LARGE)


FORMS: dict[str, Callable[[Path, bytes], None]] = {
    "100 MiB of spaces": _filled(b" "),
    "100 MiB of nothing": _filled(b"\0"),
    "100 MiB of brackets": _filled(b"["),
    "100 MiB of objects in objects": _filled(b'{"a":'),
    "100 MiB of digits": _filled(b"9"),
    "100 MiB of lines": _filled(b"\n"),
    "100 MiB of one string": _filled(b"a", b'"', b'"'),
    "100 MiB of one key": _filled(b"a", b'{"', b'": 1}'),
    "100 MiB of zeros in a list": _filled(b"0,", b"[", b"0]"),
    "100 MiB of one dotted key": _filled(b"a.", b"", b"a = 1"),
    "itself, with 100 MiB of spaces behind": _padded,
    f"{DEEP:,} lists in lists": _text(b"[" * DEEP + b"]" * DEEP),
    f"{DEEP:,} objects in objects": _text(b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    f"{DEEP:,} inline tables": _text(b"a = " + b"{a = " * DEEP + b"1" + b"}" * DEEP),
    f"{DEEP:,} tables": _text(b"".join(b"[a%d]\n" % number for number in range(DEEP))),
    "a value of 10,000 lists": _text(b'{"version": ' + b"[" * DEEP + b"]" * DEEP + b"}"),
    "empty": lambda path, sample: path.touch(),
    "a hole of 1 TiB": _sparse,
    "a directory": lambda path, sample: path.mkdir(),
    "a pipe": lambda path, sample: os.mkfifo(path),
    "a socket": _socket,
    "a link to /dev/zero": lambda path, sample: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path, sample: path.symlink_to(path),
    "a link to nothing": lambda path, sample: path.symlink_to("nothing"),
}


def _zigzag(number: int) -> bytes:
    """A 64-bit integer of Thrift's compact protocol."""
    rest, content = number << 1, bytearray()
    while rest > 127:
        content.append(rest & 127 | 128)
        rest >>= 7
    return bytes([*content, rest])


def _rows_declared(count: int) -> Callable[[Path, bytes], None]:
    def make(path: Path, sample: bytes) -> None:
        length = int.from_bytes(sample[-8:-4], "little")
        body, footer = sample[: -8 - length], sample[-8 - length : -8]
        true = b"\x16" + _zigzag(pq.ParquetFile(pa.BufferReader(sample)).metadata.num_rows)
        assert true in footer
        footer = footer.replace(true, b"\x16" + _zigzag(count))
        path.write_bytes(body + footer + len(footer).to_bytes(4, "little") + b"PAR1")

    return make


def _rows_repeated(rows: int, label: str) -> Callable[[Path, bytes], None]:
    """A small file of many equal rows, or of one text many times."""

    def make(path: Path, sample: bytes) -> None:
        one = pq.read_table(pa.BufferReader(sample)).slice(0, 1)
        columns, fields = [], []
        for field in ledger.COLUMNS:
            value = label if field.name == "label" else one.column(field.name)[0].as_py()
            indices = pa.nulls(rows, pa.int32()).fill_null(0)
            column = pa.DictionaryArray.from_arrays(indices, pa.array([value], field.type))
            columns.append(pa.nulls(rows, field.type) if value is None else column)
            fields.append(pa.field(field.name, columns[-1].type, nullable=field.nullable))
        table = pa.table(columns, schema=pa.schema(fields))
        with pq.ParquetWriter(
            path, table.schema, compression="zstd", write_page_checksum=True, store_schema=False
        ) as writer:
            writer.write_table(table)

    return make


LEDGERS = {
    **{f"of {count} rows by its own word": _rows_declared(count) for count in (2**28, 2**31, 2**60, 2**62)},
    "of a million equal rows": _rows_repeated(10**6, "a"),
    "of one text of a MiB, 20,000 times": _rows_repeated(20_000, "a" * (1 << 20)),
}
TOKENIZERS = {
    f"of the id {number}": (lambda path, sample, number=number: path.write_bytes(
        sample.replace(b'"rain":', b'"rain":%d,"x":' % number, 1)) and None)
    for number in (2**24, 2**31 - 1, 2**32 - 1, 2**60)
}  # fmt: skip
MAKERS = {**FORMS, **LEDGERS, **TOKENIZERS}


def _pickles(mark: Path) -> dict[str, bytes]:
    class Mark:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(mark),)

    found = {f"a pickle of protocol {number}": pickle.dumps(Mark(), protocol=number) for number in (0, 2, 4, 5)}
    for zipped in (True, False):
        file = io.BytesIO()
        torch.save({"model": Mark(), "tensor": torch.zeros(4)}, file, _use_new_zipfile_serialization=zipped)
        found[f"torch.save's, zipped: {zipped}"] = file.getvalue()
    objects = np.empty(1, object)
    objects[0] = Mark()
    file = io.BytesIO()
    np.save(file, objects, allow_pickle=True)
    found["an object array"] = file.getvalue()
    file = io.BytesIO()
    np.savez(file, x=objects)
    found["an archive of object arrays"] = file.getvalue()
    return found


KINDS = {"bounds": bounds, "pickles": pickles}
