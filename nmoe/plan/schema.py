"""The closed table as a JSON Schema (draft 2020-12), for editors that complete and check TOML.

It says what the annotations and `key` say: names, types, bounds, choices, defaults, help. What two
sections say about each other is beyond a schema; `nmoe build` checks that.
"""

from typing import Any, get_args, get_origin

import attrs

from nmoe.plan.canonical import MAX_INT
from nmoe.plan.structure import fields_of, implies_kind, is_array, is_section, type_of
from nmoe.registry.table import TABLE

TYPES = {int: "integer", float: "number", bool: "boolean", str: "string"}
BOUNDS = {"minimum": "minimum", "above": "exclusiveMinimum", "maximum": "maximum", "below": "exclusiveMaximum"}


def schema() -> dict[str, Any]:
    """The schema of a config file: whole, or a child of another, which may leave out what its parent says."""
    child = _section("", child=True)
    extends = {"type": "string", "minLength": 1, "description": "one parent file, relative to this one"}
    child["properties"] = {"extends": extends, **child["properties"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "a config of nmoe",
        "type": "object",
        "if": {"required": ["extends"]},
        "then": {"$ref": "#/$defs/child"},
        "else": {"$ref": "#/$defs/config"},
        "$defs": {"config": _section("", child=False), "child": child},
    }


def _section(table: str, *, child: bool) -> dict[str, Any]:
    kinds = [_spec(table, kind, cls, child=child) for kind, cls in TABLE[table].items()]
    return kinds[0] if len(kinds) == 1 else {"anyOf": kinds}


def _spec(table: str, kind: str | None, cls: type, *, child: bool) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    required = []
    if kind is not None:
        properties["kind"] = {"const": kind}
        if not implies_kind(table):
            required.append("kind")
    for field in fields_of(cls).values():
        properties[field.name] = _field(table, field, child=child)
        if field.default is attrs.NOTHING and not field.metadata.get("implied"):
            required.append(field.name)
    text = (cls.__doc__ or "").strip().split("\n")[0]
    described = {"description": text} if text and not text.startswith("Method generated") else {}
    needed = {} if child else {"required": required}
    return {"type": "object", **described, "properties": properties, **needed, "additionalProperties": False}


def _field(table: str, field: "attrs.Attribute[Any]", *, child: bool) -> dict[str, Any]:
    said: dict[str, Any] = {"description": field.metadata["help"]}
    if is_section(field):
        below = _section(f"{table}.{field.name}".lstrip("."), child=child and not is_array(field))
        return {"type": "array", "items": below, **said} if is_array(field) else {**below, **said}
    wanted = type_of(field)
    if get_origin(wanted) is tuple:
        arms = get_args(wanted)
        fixed = {} if arms[-1] is Ellipsis else {"minItems": len(arms), "maxItems": len(arms)}
        said |= {"type": "array", "items": _scalar(arms[0], field), **fixed}
    else:
        said |= _scalar(wanted, field)
    if field.default is not attrs.NOTHING and field.default is not None:
        said["default"] = list(field.default) if isinstance(field.default, tuple) else field.default
    return said


def _scalar(wanted: type, field: "attrs.Attribute[Any]") -> dict[str, Any]:
    said: dict[str, Any] = {"type": TYPES[wanted]}
    for ours, theirs in BOUNDS.items():
        if field.metadata[ours] is not None:
            said[theirs] = field.metadata[ours]
    if wanted is int:
        said.setdefault("maximum", MAX_INT)
    if field.metadata["choices"]:
        said["enum"] = list(field.metadata["choices"])
    if wanted is str:
        said["minLength"] = 1
    return said
