"""What is wrong with what a reader of nmoe answered: each judge parses the file itself, with the standard library."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

MANIFEST = Path("train/manifest.json")
HEX = re.compile(r"[0-9a-f]{64}")
LINE = re.compile(r"[0-9a-f]{32}")
MOST = 2**53 - 1
TOKEN_BYTES = 1 << 24
CHECKPOINT = {
    "attempt": int, "created": str, "data": dict, "environment": dict, "fingerprint": str, "lineage": str, "run": str,
    "seal": str, "sections": dict, "state": dict, "state_digest": str, "step": int, "tensors": dict, "tree_digest": str,
    "version": int,
}  # fmt: skip
STATE = {"step": None, "schedule": {"tokens_seen"}, "loader": {"next_batch"}, "rng": {"rounding"}}
OWNER = {"pid": int, "purpose": str, "host": str, "machine_id": str, "boot_id": str, "started": str}


def strict(content: bytes) -> Any:
    """JSON in UTF-8 with each key once and no NaN; AssertionError for anything else."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs), "a key twice"
        return dict(pairs)

    def never(text: str) -> Any:
        raise AssertionError(f"{text} is no JSON")

    return json.loads(content.decode("utf-8"), object_pairs_hook=once, parse_constant=never)


def _parsed(content: bytes) -> tuple[Any, list[str]]:
    try:
        return strict(content), []
    except (AssertionError, ValueError, RecursionError) as fault:
        return None, [f"no JSON by the book: {fault!s:.100}"]


def _typed(fields: Any, types: dict[str, type]) -> Iterator[str]:
    for name, wanted in types.items():
        if type(fields.get(name)) is not wanted:
            yield f"`{name}` is {fields.get(name)!r:.60}"


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST


def of_checkpoint(answer: dict[str, Any]) -> Iterator[str]:
    """HEAD and the manifest that it names."""
    head, faults = _parsed(answer["head"])
    yield from faults
    if answer["manifest"] is None:
        if head != {"manifest": None, "step": 0, "version": 1} or type(head["version"]) is not int:
            yield f"no checkpoint, by the HEAD {answer['head'][:80]!r}"
        return
    if faults:
        return
    if (
        head.keys() != {"manifest", "step", "version"}
        or not HEX.fullmatch(head["manifest"])
        or type(head["step"]) is not int
    ):
        yield f"the HEAD {head!r:.100}"
    fields, faults = _parsed(answer["content"])
    yield from faults
    if faults:
        return
    if fields.keys() != {*CHECKPOINT, "parent"}:
        yield f"the keys {sorted(fields.keys() ^ {*CHECKPOINT, 'parent'})!r:.100}"
    yield from _typed(fields, CHECKPOINT)
    for name in ("fingerprint", "tree_digest", "seal", "state_digest"):
        if not HEX.fullmatch(str(fields[name])):
            yield f"`{name}` is {fields[name]!r:.80}"
    if not 1 <= fields["attempt"] <= 2**31 - 1:
        yield f"the attempt {fields['attempt']!r:.40}"
    for name in ("data", "sections"):
        if not all(HEX.fullmatch(str(value)) for value in fields[name].values()):
            yield f"`{name}` is {fields[name]!r:.200}"
    if fields["environment"].keys() != {"exact", "recorded"}:
        yield f"the environment has {sorted(fields['environment'])!r:.80}"
    elif not all(isinstance(part, dict) for part in fields["environment"].values()):
        yield "a part of the environment is no object"
    state, step = fields["state"], fields["step"]
    if state.keys() != STATE.keys() or any(below and state[name].keys() != below for name, below in STATE.items()):
        yield f"the state {state!r:.200}"
    elif not all(
        map(_count, (state["step"], *(value for name in STATE if name != "step" for value in state[name].values())))
    ):
        yield f"the counters {state!r:.200}"
    elif state["step"] != step:
        yield f"the state of step {state['step']} in the manifest of step {step}"
    parent = fields["parent"]
    if parent is not None and (parent.keys() != {"manifest", "step"} or not 1 <= parent["step"] < step):
        yield f"the parent {parent!r:.100}"
    for name, tensor in fields["tensors"].items():
        if tensor.keys() != {"dtype", "shape", "slices"} or not all(map(_count, tensor["shape"])) or ".." in name:
            yield f"the tensor {name!r:.80}: {tensor!r:.100}"


def of_events(answer: dict[str, Any]) -> Iterator[str]:
    """Each line that the history kept, and what was taken from them."""
    if not LINE.fullmatch(answer["lineage"]) or not 1 <= answer["attempt"] <= 2**31 - 1:
        yield f"the lineage {answer['lineage']!r:.80} and the attempt {answer['attempt']!r:.40}"
    for line in answer["events"].split(b"\n")[:-1]:
        event, faults = _parsed(line)
        yield from faults
        if faults:
            continue
        if not isinstance(event, dict):
            yield f"an event that is no object: {line[:80]!r}"
            continue
        yield from _typed(event, {"time": str, "event": str, "lineage": str, "attempt": int})
        if event.get("event") in ("stop", "saving") and not _count(event.get("step")):
            yield f"the step {event.get('step')!r:.40}"


def of_owner(content: bytes) -> Iterator[str]:
    fields, faults = _parsed(content)
    yield from faults
    if not faults:
        if fields.keys() != OWNER.keys():
            yield f"the keys {sorted(fields)!r:.100}"
        yield from _typed(fields, OWNER)


def of_looks(answer: dict[str, Any]) -> Iterator[str]:
    """`nmoe compare` of the run and its twin, and the plan.json that the next attempt leaves."""
    if answer["status"] not in (0, 1, 2) or "Traceback" in answer["said"]:
        yield f"nmoe compare: status {answer['status']}, {answer['said'][-200:]!r}"
    plan, faults = _parsed(answer["plan"])
    yield from faults
    if not faults:
        yield from _typed(plan, {"fingerprint": str, "tree_digest": str, "sections": dict, "resolved": dict})


def of_rows(table: Any) -> Iterator[str]:
    """One step of the ledger."""
    try:
        rows = table.to_pylist()
    except UnicodeDecodeError as fault:
        yield f"text that is no UTF-8: {fault}"
        return
    for column in ("run", "lineage", "attempt", "step", "tokens_seen", "time_ns"):
        values = {row[column] for row in rows}
        if len(values) != 1 or None in values:
            yield f"`{column}` is {sorted(map(str, values))[:3]}"
    if any(row["name"] is None or (row["attempt"] or 0) < 1 or (row["tokens_seen"] or 0) < 0 for row in rows):
        yield "a row without a name, or of no attempt"
    if len({tuple(row[key] for key in ("name", "layer", "expert", "rank", "label")) for row in rows}) != len(rows):
        yield "a row twice"


def of_shards(source: Any) -> Iterator[str]:
    """Tokens within the vocabulary, documents that begin where they do, bytes that add up."""
    tokens, starts = source.read(0, source.num_tokens), source.document_starts
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < source.vocab_size:
        yield "a token outside the vocabulary"
    if not np.array_equal(np.flatnonzero(tokens == source.end_of_document), starts):
        yield "documents that do not begin at their ends"
    if len(source.token_bytes_V) != source.vocab_size or not 0 <= source.end_of_document < source.vocab_size:
        yield "a vocabulary of another size"
    fields, faults = _parsed((source.directory / "manifest.json").read_bytes())
    yield from faults
    if not faults and fields["num_tokens"] != sum(one["num_tokens"] for one in fields["shards"]):
        yield "shards that do not add up"


def of_journal(answer: dict[str, Any]) -> Iterator[str]:
    """A preparation that went on has made what one makes that was never cut off.

    Bytes of text that are in no file are as its seal has them; `nmoe data inspect --verify` counts them.
    """
    found, wanted = (dict(answer[key]) for key in ("found", "wanted"))
    for files in (found, wanted):
        manifest = json.loads(files[MANIFEST])
        del manifest["text_bytes"], manifest["altered_documents"]
        files[MANIFEST] = manifest
    if found != wanted:
        odd = sorted(str(name) for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        yield f"other data than the straight preparation's: {', '.join(odd)}"


def of_tokenizer(answer: dict[str, Any]) -> Iterator[str]:
    made, ids = answer["tokenizer"], answer["ids"]
    if not 0 < made.vocab_size <= TOKEN_BYTES or len(made.token_bytes_V) != made.vocab_size:
        yield f"a vocabulary of {made.vocab_size}"
    elif not 0 <= made.end_of_document < made.vocab_size or (made.token_bytes_V < 0).any():
        yield f"documents end with {made.end_of_document} of {made.vocab_size}"
    elif len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < made.vocab_size:
        yield f"an id outside the vocabulary of {made.vocab_size}: {int(ids.max())}"
    elif (ids == made.end_of_document).any():
        yield "text that ends a document"
