"""Every file that nmoe parses from the disk, and how it reads each: a run that was trained, data that were prepared.

A File says where one lies, what reads it, and who judges the answer that its reader gave all the same; `restored` puts
back whatever a case or a reader has changed.
"""

import contextlib
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import numpy as np

from nmoe.checkpoint import reader
from nmoe.checkpoint.verify import verify
from nmoe.cli.main import run
from nmoe.data.prepare import Progress, Request, prepare
from nmoe.data.shards import ShardSource, open_shards
from nmoe.data.tokenizer import BytesTokenizer, HuggingFaceTokenizer, TiktokenTokenizer, Tokenizer
from nmoe.errors import NmoeError
from nmoe.metrics import ledger
from nmoe.metrics.reader import last_value
from nmoe.plan.fingerprint import digest, fingerprint
from nmoe.plan.resolve import resolve
from nmoe.rdep.control import Control
from nmoe.report.run import read_run
from nmoe.train.run_dir import RunDir
from nmoe.train.run_lock import this_process
from nmoe.train.state import TrainState
from tests.torture import fuzz_judges as judges
from tests.torture import trainings

LARGEST = 1 << 24  # of the files that are read; what is larger is a case's own
TEXT = "The rain it raineth every day.\nWith hey, ho, the wind and the rain: é \U0001f600 0123456789.\n"


@attrs.frozen(kw_only=True)
class File:
    """path: where it lies. read: all that nmoe does with it; judge: of its answer. indent: of its JSON; None: one line.

    around: what else reading may change, or a case does. kind: "json", "lines" (of JSON), "text" or "bytes".
    """

    path: Path
    read: Callable[[], Any]
    judge: Callable[[Any], Iterator[str]]
    kind: str
    around: tuple[Path, ...] = ()
    indent: int | None = None


@contextlib.contextmanager
def restored(paths: tuple[Path, ...]) -> Iterator[None]:
    """Files and directories as they were before the block, whatever has become of them in it."""
    before = {path: _content(path) for path in paths}
    try:
        yield
    finally:
        for path, content in before.items():
            if _content(path) != content:
                _put_back(path, content)


def _content(path: Path) -> Any:
    if path.is_symlink() or not path.exists():
        return None
    if path.is_dir():
        return {one.relative_to(path): _content(one) for one in path.rglob("*") if not one.is_dir()}
    status = path.stat()
    return path.read_bytes() if path.is_file() and status.st_size <= LARGEST else status.st_ino


def _put_back(path: Path, content: Any) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if isinstance(content, dict):
        path.mkdir()
        for name, one in content.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(one)
    elif content is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def of_run(directory: Path, *sets: str) -> dict[str, File]:
    """The files of a run of three steps, made there; this process can fork trainings from then on.

    sets: keys beside, as to stop before its end.
    """
    trainings.begin(directory, *sets)
    disk = directory / "straight"
    shutil.copytree(disk, directory / "twin")
    here = disk / "run"
    plan, text = resolve(trainings.SMALL, trainings.command(disk, *sets)[3::2]), trainings.SMALL.read_text()
    checkpoints = here / "checkpoints"
    step = reader.head_step(checkpoints)
    manifest = checkpoints / f"step_{step:08d}" / "manifest.json"
    tops = tuple(
        here / name for name in ("events.jsonl", "owner.json", "plan.json", "env.json", "config.toml", "resolved.toml")
    )
    ends = (checkpoints / "HEAD", manifest, here / "error.json", *tops)

    def opened() -> dict[str, Any]:
        with RunDir.open(plan, config_text=text) as run_dir:
            return {
                "lineage": run_dir.lineage,
                "attempt": run_dir.attempt,
                "events": (here / "events.jsonl").read_bytes(),
            }

    def saved() -> dict[str, Any]:
        found = reader.open_head(checkpoints, Control.alone())
        report = verify(checkpoints, threads=1)
        graph = SimpleNamespace(rounding=SimpleNamespace(counter=0))
        state = None if found is None else TrainState.restore(dict(found.state), graph, step=found.step)  # type: ignore[arg-type]
        return {"manifest": found, "state": state, "faults": report.faults, "content": manifest.read_bytes(),
                "head": (checkpoints / "HEAD").read_bytes()}  # fmt: skip

    def looked_at() -> dict[str, Any]:
        read_run(here)
        status, said = spoken(["compare", str(here), str(directory / "twin" / "run")])
        with RunDir.open(plan, config_text=text):
            pass
        return {"status": status, "said": said, "plan": (here / "plan.json").read_bytes()}

    rows = here.parent / "metrics" / "run" / ledger.file_name(step)
    owner = here / "owner.json"
    owner.write_text(json.dumps(attrs.asdict(this_process("nmoe train")), indent=1) + "\n")  # died as the owner

    def owned() -> bytes:
        plain = owner.is_file() and owner.stat().st_size <= LARGEST
        content = owner.read_bytes() if plain else b""
        opened()
        return content

    def recorded() -> Any:
        refused = None
        try:
            table = ledger.read(rows, step=step, run="run")
        except NmoeError as error:
            refused = error
        last_value(rows.parent, "eval/bits_per_byte")  # by another library, which has to get through on its own
        if refused is not None:
            raise refused
        return table

    file, json_file = partial(File, around=ends), partial(File, around=ends, kind="json")
    return {
        "HEAD": json_file(path=checkpoints / "HEAD", read=saved, judge=judges.of_checkpoint),
        "checkpoint manifest": json_file(path=manifest, read=saved, judge=judges.of_checkpoint),
        "events": file(path=here / "events.jsonl", read=opened, judge=judges.of_events, kind="lines"),
        "owner": json_file(path=owner, read=owned, judge=judges.of_owner, indent=1),
        "plan": json_file(path=here / "plan.json", read=looked_at, judge=judges.of_looks, indent=1),
        "environment": json_file(path=here / "env.json", read=looked_at, judge=judges.of_looks, indent=1),
        "ledger": File(path=rows, read=recorded, judge=judges.of_rows, kind="bytes", around=(rows,)),
    }


def spoken(words: list[str]) -> tuple[int, str]:
    """The status of a command line, and all that it said, as strict UTF-8 takes it."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run(words)
        out.flush()
    return status, out.buffer.getvalue().decode() + err.getvalue()  # type: ignore[attr-defined]


class Stop(Exception):
    """A preparation is cut off."""


def of_data(directory: Path) -> dict[str, File]:
    """Token shards, the journal of a preparation that was cut off, documents, and tokenizers of both formats."""
    text = directory / "text.txt"
    text.write_text("\0".join(f"{number} {TEXT}" for number in range(200)))
    request = Request(separator=b"\0", shard_tokens=4096)
    prepare([text], directory / "data", BytesTokenizer(), request, workers=1)
    train = directory / "data" / "train"
    cut = directory / "cut"
    seen = []

    def stop(progress: Progress) -> None:
        seen.append(progress)
        raise Stop

    with contextlib.suppress(Stop):
        prepare([text], cut, BytesTokenizer(), request, workers=1, progress=stop)
    assert seen
    assert (cut / "prepare.json").exists()
    straight = {path.relative_to(directory / "data"): path.read_bytes() for path in (directory / "data").rglob("*.*")}

    def opened() -> ShardSource:
        source = open_shards(train)
        source.read(0, source.num_tokens)
        source.verify()
        return source

    def continued() -> dict[str, Any]:
        prepare([text], cut, BytesTokenizer(), request, workers=1)
        found = {path.relative_to(cut): path.read_bytes() for path in cut.rglob("*.*")}
        return {"found": found, "wanted": straight}

    documents = directory / "in.jsonl"
    documents.write_text("".join(json.dumps({"text": f"{number} {TEXT}", "x": [number]}) + "\n" for number in range(5)))
    packed, out = directory / "in.txt.gz", directory / "out"
    packed.write_bytes(_gzip(TEXT.encode() * 20))

    def prepared(path: Path) -> Callable[[], Any]:
        def act() -> Any:
            shutil.rmtree(out, ignore_errors=True)
            prepare([path], out, BytesTokenizer(), Request(), workers=1)
            return open_shards(out / "train")

        return act

    shards = partial(File, judge=judges.of_shards)
    inside = partial(shards, read=opened, around=(train,))
    return {
        "shards' manifest": inside(path=train / "manifest.json", kind="json"),
        **{f"{name}.bin": inside(path=train / f"{name}.bin", kind="bytes")
           for name in ("shard_000000", "blocks", "documents", "token_bytes")},
        "journal": File(
            path=cut / "prepare.json", read=continued, judge=judges.of_journal, kind="json", around=(cut,), indent=1
        ),
        "JSON lines": shards(path=documents, read=prepared(documents), kind="lines", around=(documents,)),
        "packed text": shards(path=packed, read=prepared(packed), kind="bytes", around=(packed,)),
        **of_tokenizers(directory),
    }  # fmt: skip


def of_tokenizers(directory: Path) -> dict[str, File]:
    """A `tokenizer.json` of byte pairs with special tokens, and ranks."""
    import base64

    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        [TEXT] * 4,
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False),
    )
    pairs, ranks = directory / "tokenizer.json", directory / "ranks.tiktoken"
    trained.save(str(pairs), pretty=False)
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" r", b"ai", b"rain"]
    ranks.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))

    def used(make: Callable[[], Tokenizer]) -> Callable[[], dict[str, Any]]:
        def act() -> dict[str, Any]:
            made = make()
            ids = made.encode(TEXT)
            return {"tokenizer": made, "ids": ids, "text": made.decode(np.asarray(ids))}

        return act

    return {
        "tokenizer.json": File(
            path=pairs, read=used(lambda: HuggingFaceTokenizer(path=str(pairs), end_of_document="<|end|>")),
            judge=judges.of_tokenizer, kind="json", around=(pairs,)),
        "ranks": File(
            path=ranks, read=used(lambda: TiktokenTokenizer(path=str(ranks), pattern="gpt2")),
            judge=judges.of_tokenizer, kind="text", around=(ranks,)),
    }  # fmt: skip


def resealed(checkpoints: Path, step: int, fields: Any) -> None:
    """Puts that manifest in HEAD's place with the seals and hashes that a save of it would have, if it can have any."""
    if isinstance(fields, dict):
        if {"state", "step", "tensors"} <= fields.keys() and "state_digest" in fields:
            fields["state_digest"] = _digest({key: fields[key] for key in ("state", "step", "tensors")})
        if "seal" in fields:
            fields["seal"] = _digest({key: value for key, value in fields.items() if key != "seal"})
    content = _text(fields)
    (checkpoints / f"step_{step:08d}" / "manifest.json").write_bytes(content)
    head = {"manifest": hashlib.sha256(content).hexdigest(), "step": step, "version": 1}
    (checkpoints / "HEAD").write_bytes(_text(head))


def sealed_plan(path: Path) -> None:
    """Gives a plan.json the digests of its sections and of its tree, if they can have any."""
    try:
        stored = json.loads(path.read_bytes())
        stored.update(fingerprint=fingerprint(stored["sections"]), tree_digest=digest(stored["resolved"]))
        path.write_text(json.dumps(stored, indent=1))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, NmoeError):
        return


def _digest(value: Any) -> str:
    return hashlib.sha256(_text(value)).hexdigest()


def _text(value: Any) -> bytes:
    """Canonical JSON, for all values that have it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


def _gzip(content: bytes) -> bytes:
    import gzip

    return gzip.compress(content, mtime=0)
