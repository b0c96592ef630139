"""What an unfinished preparation knows of itself: `prepare.json`, sealed, and nothing in it taken on trust.

    request        digest of the options and of the tokenizer        documents, empty   counted so far
    next_batch     batches that are done                             splits             by part: null, or what
    inputs_sha256  of what they were made of                                            ShardWriter.checkpoint gave
    seal           SHA-256 of the rest, in canonical JSON (sorted keys, no space)
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nmoe import strict_json
from nmoe.data import files
from nmoe.data.writer import damaged, write_whole

NAME = "prepare.json"
MAX_BYTES = 2**28
MOST = 2**53 - 1
COUNTS = ("num_documents", "num_tokens", "text_bytes", "altered_documents")


def write(directory: Path, fields: dict[str, Any]) -> None:
    """Durably, in one piece."""
    write_whole(directory / NAME, json.dumps({**fields, "seal": _seal(fields)}, indent=1).encode("ascii"))


def read(directory: Path, *, request: str, splits: Sequence[str], item_bytes: int) -> dict[str, Any]:
    """The fields without the seal. RunError N0262 unless they are what `write` was given, and fit together.

    request: of another one only the digest is looked at. splits: the parts that it makes. item_bytes: of a token.
    """
    path = directory / NAME
    try:
        content = files.read(path, limit=MAX_BYTES)
        journal = strict_json.loads(content)
        _require(isinstance(journal, dict) and len(content) <= MAX_BYTES)
        _require(journal.pop("seal", None) == _seal(journal))
        _require(journal.keys() == {"request", "next_batch", "inputs_sha256", "documents", "empty", "splits"})
        _require(isinstance(journal["request"], str) and isinstance(journal["splits"], dict))
        _require(all(_is_count(journal[key]) for key in ("next_batch", "documents", "empty")))
        if journal["request"] == request:
            _require(journal["splits"].keys() == set(splits))
        if journal["request"] == request and journal["next_batch"]:
            _require(_is_sha256(journal["inputs_sha256"]))
            for state in journal["splits"].values():
                _check_split(state, item_bytes)
            _require(journal["documents"] == sum(state["num_documents"] for state in journal["splits"].values()))
    except (OSError, ValueError) as error:
        raise damaged(path) from error
    return journal


def _check_split(state: Any, item_bytes: int) -> None:
    """ValueError unless its files hold as many tokens and documents as it counts."""
    _require(isinstance(state, dict) and state.keys() == {"shards", "shard", "documents", *COUNTS})
    _require(all(_is_count(state[key]) for key in COUNTS) and isinstance(state["shards"], list))
    for entry in state["shards"]:
        _require(isinstance(entry, dict) and entry.keys() == {"num_tokens", "sha256"})
        _require(_is_count(entry["num_tokens"]) and _is_sha256(entry["sha256"]))
    for key in ("shard", "documents"):
        file = state[key]
        _require(isinstance(file, dict) and file.keys() == {"bytes", "sha256"})
        _require(_is_count(file["bytes"]) and _is_sha256(file["sha256"]))
    finished = sum(entry["num_tokens"] for entry in state["shards"])
    _require(finished * item_bytes + state["shard"]["bytes"] == state["num_tokens"] * item_bytes)
    _require(state["documents"]["bytes"] == 8 * state["num_documents"])
    _require(state["altered_documents"] <= state["num_documents"])


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError("no writer leaves such a journal")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _seal(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()
