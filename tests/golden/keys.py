"""Every key that a config may have, one a line: what the registry says, as it was last agreed to.

    SECTION (KIND) KEY: TYPE; BOUNDS; required

The golden file is read by the fuzz campaign's own judge of what a plan may hold: a bound that moves has to move there
too.
"""

import typing
from pathlib import Path

import attrs

from nmoe.plan.structure import fields_of, implies_kind, is_array, is_section
from nmoe.registry.table import TABLE

KEYS = Path(__file__).with_name("keys.txt")
SIGNS = {"minimum": ">=", "above": ">", "maximum": "<=", "below": "<"}
NAMES = {int: "int", float: "float", bool: "bool", str: "str"}


def render() -> str:
    return "\n".join(line for table, kinds in TABLE.items() for kind, cls in kinds.items()
                     for line in _spec(table, kind, cls)) + "\n"  # fmt: skip


def _spec(table: str, kind: str | None, cls: type) -> typing.Iterator[str]:
    head = f"{table or '-'} ({'' if kind is None else kind})"
    if kind is not None:
        yield f"{head} kind: kind" + ("" if implies_kind(table) else "; required")
    for field in fields_of(cls).values():
        needed = field.default is attrs.NOTHING and not field.metadata.get("implied")
        limits = ["sections" if is_array(field) else "section"] if is_section(field) else [*_limits(field)]
        yield f"{head} {field.name}: " + "; ".join([*limits, *(["required"] if needed else [])])


def _limits(field: "attrs.Attribute[object]") -> typing.Iterator[str]:
    arms = [arm for arm in typing.get_args(field.type) if arm is not type(None)]
    wanted = arms[0] if type(None) in typing.get_args(field.type) else field.type
    if typing.get_origin(wanted) is tuple:
        items = typing.get_args(wanted)
        yield f"{NAMES[items[0]]}[{'' if items[-1] is Ellipsis else len(items)}]"
    else:
        yield NAMES[wanted]
    for name, sign in SIGNS.items():
        if field.metadata[name] is not None:
            yield f"{sign} {field.metadata[name]!r}"
    if field.metadata["choices"]:
        yield "one of " + " ".join(field.metadata["choices"])
