"""Two plans side by side: the sections whose digests differ, and the keys that make them differ."""

from collections.abc import Iterator
from typing import Any

from nmoe.plan.fingerprint import is_outside
from nmoe.plan.plan import Plan
from nmoe.plan.render import SHORT, ascii_text, rows, value_text
from nmoe.plan.toml import is_tables


def flat(table: Any, path: str = "") -> dict[str, Any]:
    """Dotted path -> value of every key of a plain tree."""
    items = table.items() if isinstance(table, dict) else enumerate(table)
    values: dict[str, Any] = {}
    for name, value in items:
        here = f"{path}.{name}".lstrip(".")
        values |= flat(value, here) if is_tables(value) else {here: value}
    return values


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value here, value there) of every key that differs, in the order of the trees; None is absence."""
    return [(key, one.get(key), other.get(key)) for key in _joined(one, other) if one.get(key) != other.get(key)]


def _joined(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Both orders in one: keys that only `other` has stand after the key they follow there."""
    keys = list(one)
    at = 0
    for key in other:
        if key in one:
            at = keys.index(key) + 1
        else:
            keys.insert(at, key)
            at += 1
    return keys


def render_diff(one: Plan, other: Plan) -> str:
    """One line for each difference; the last line says whether the fingerprints are equal."""
    return "\n".join(line.rstrip() for line in _lines(one, other)) + "\n"


def _lines(one: Plan, other: Plan) -> Iterator[str]:
    yield f"- {ascii_text(one.name)}".ljust(40) + one.fingerprint
    yield f"+ {ascii_text(other.name)}".ljust(40) + other.fingerprint
    changed = [
        [f"[{name}]", (a or "-")[:SHORT], (b or "-")[:SHORT], "outside the fingerprint" if is_outside(name) else ""]
        for name, a, b in differing(one.sections, other.sections)
    ]
    if changed:
        yield ""
        yield from rows([["section", "-", "+", ""], *changed], "<<<<")
    keys = [
        [key, "-" if a is None else value_text(a), "-" if b is None else value_text(b)]
        for key, a, b in differing(flat(one.tree), flat(other.tree))
    ]
    if keys:
        yield ""
        yield from rows([["key", "-", "+"], *keys], "<<<")
    yield ""
    if one.fingerprint == other.fingerprint:
        yield "same fingerprint" + ("" if one.tree_digest == other.tree_digest else ": nothing here changes training")
    else:
        yield "different fingerprints"
