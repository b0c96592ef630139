"""JSON from outside (RFC 8259), read by the book: what readers of it could disagree on is refused.

Python's own reader takes the last of two equal keys, NaN, numbers that overflow to infinity, UTF-16, lone surrogates,
and nests as deep as its stack. Each of them would be one thing here and another to the next reader, or fail far from
the file.
"""

import json
import math
from typing import Any

DEPTH_LIMIT = 64


def loads(content: bytes) -> Any:
    """The value of a text in UTF-8; ValueError says what is wrong with it."""
    try:
        value = json.loads(
            content.decode("utf-8"), object_pairs_hook=_once, parse_constant=_constant, parse_float=_finite
        )
    except RecursionError as cause:
        raise ValueError(f"it nests deeper than {DEPTH_LIMIT} levels") from cause
    _check(value)
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is beyond what a double holds")
    return value


def _check(value: Any) -> None:
    """Depth and texts, level by level."""
    level: list[Any] = [value]
    for _ in range(DEPTH_LIMIT + 1):
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below += [*one.keys(), *one.values()]
            elif isinstance(one, list):
                below += one
            elif isinstance(one, str) and not one.isascii():
                one.encode("utf-8")  # UnicodeEncodeError is a ValueError
        if not below:
            return
        level = below
    raise ValueError(f"it nests deeper than {DEPTH_LIMIT} levels")
