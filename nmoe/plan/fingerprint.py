"""The name of a plan: a hash over the resolved tree that only training can change.

The tree of a config is a plain nested dict in the table's order. It holds every default, and it
does not hold an optional key or section that is absent: absence is the one form of absence, so a
key that a later version adds, optional and absent, changes no fingerprint of today.

    digest(section)  = SHA-256(canonical({key: value}))       its own keys, its `kind` included
    fingerprint      = SHA-256(canonical({section: digest}))  over the sections inside
    tree_digest      = SHA-256(canonical(tree))               everything

A section is named by its dotted path, one of an array by its index ("data.stages.0"). Outside the
fingerprint stand the sections of registry.table.OUTSIDE with all below them, and keys that their
spec declares `outside` (paths); a section inside does not hash its outside keys.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

from nmoe.plan.canonical import canonical
from nmoe.plan.structure import fields_of, is_section
from nmoe.registry.table import OUTSIDE, TABLE


def tree_of(spec: Any, table: str = "") -> dict[str, Any]:
    """The plain tree of a structured config: kind first, then keys, then sub-sections."""
    tree: dict[str, Any] = {}
    kind = next(k for k, cls in TABLE[table].items() if cls is type(spec))
    if kind is not None:
        tree["kind"] = kind
    fields = fields_of(type(spec)).values()
    for field in fields:
        value = getattr(spec, field.name)
        if not is_section(field) and value is not None:
            tree[field.name] = list(value) if isinstance(value, tuple) else value
    for field in fields:
        value = getattr(spec, field.name)
        if is_section(field) and value is not None:
            below = f"{table}.{field.name}".lstrip(".")
            tree[field.name] = (
                [tree_of(item, below) for item in value] if isinstance(value, tuple) else tree_of(value, below)
            )
    return tree


def is_outside(section: str) -> bool:
    """Whether a section, with all below it, cannot change a bit of training."""
    return section.split(".")[0] in OUTSIDE


def sections_of(spec: Any, table: str = "", name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(dotted name, keys that its digest covers) of every section, in the table's order; the root has no keys."""
    tree = tree_of(spec, table)
    fields = fields_of(type(spec))
    if name:
        hidden = {f.name for f in fields.values() if f.metadata.get("outside") and not is_outside(name)}
        own = {k: v for k, v in tree.items() if k not in hidden and not (k in fields and is_section(fields[k]))}
        yield name, own
    for field in fields.values():
        value = getattr(spec, field.name)
        if not is_section(field) or value is None:
            continue
        below, called = f"{table}.{field.name}".lstrip("."), f"{name}.{field.name}".lstrip(".")
        if isinstance(value, tuple):
            for index, item in enumerate(value):
                yield from sections_of(item, below, f"{called}.{index}")
        else:
            yield from sections_of(value, below, called)


def digest(value: Any) -> str:
    """SHA-256 of the canonical text, in hex."""
    return hashlib.sha256(canonical(value)).hexdigest()


def digests(config: Any) -> dict[str, str]:
    """The digest of every section, those outside the fingerprint included."""
    return {name: digest(own) for name, own in sections_of(config)}


def fingerprint(sections: dict[str, str]) -> str:
    """The hash over the sections inside."""
    return digest({name: value for name, value in sections.items() if not is_outside(name)})
