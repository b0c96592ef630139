"""A plain tree as TOML text that reads back to the same values."""

import json
from collections.abc import Iterator
from typing import Any


def toml_of(tree: dict[str, Any]) -> str:
    """The text of a nested dict of bools, ints, floats, strings, lists of them, dicts and lists of dicts."""
    return "".join(f"{line}\n" for line in _table(tree, ""))


def toml_value(value: Any) -> str:
    """One value. Floats keep every digit; strings are basic strings."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    raise TypeError(f"{type(value).__name__} has no TOML here")


def is_tables(value: Any) -> bool:
    """Whether a value is written as sections: a dict, or a list of them."""
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _table(table: dict[str, Any], name: str) -> Iterator[str]:
    for key, value in table.items():
        if not is_tables(value):
            yield f"{key} = {toml_value(value)}"
    for key, value in table.items():
        path = f"{name}.{key}".lstrip(".")
        if isinstance(value, dict):
            yield ""
            yield f"[{path}]"
            yield from _table(value, path)
        elif is_tables(value):
            for item in value:
                yield ""
                yield f"[[{path}]]"
                yield from _table(item, path)
