"""A merged tree against the specs of the closed table: strict, and everything that is wrong at once.

Strict: an integer is an integer (4.9, 4.0, true and "4" are not), a bool is a bool, a string is a
string; only a float takes an integer, because every integer within 2^53 - 1 is one exactly.

A part that is wrong is replaced by a `Broken` and the rest is structured all the same. A Broken
refuses every use, so a cross-section check that needs it stops silently there and then: it has
nothing to say before the part is mended. Every other check runs, so one go finds all there is.
"""

import types
import typing
from collections.abc import Iterator
from typing import Any, NoReturn

import attrs

from nmoe.errors import Diagnostic
from nmoe.plan.layers import Tree
from nmoe.plan.positions import Path
from nmoe.plan.source import shown
from nmoe.registry.component import Component, Problem
from nmoe.registry.table import TABLE

MAX_FINDINGS = 200
NOUNS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


class BrokenPart(Exception):
    """A check touched a part that could not be structured."""


class Broken:
    """Stands for a part that is wrong; whoever uses it learns nothing."""

    def _refuse(self, *_: object) -> NoReturn:
        raise BrokenPart

    __getattr__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _refuse  # type: ignore[assignment]
    __bool__ = __len__ = __iter__ = __contains__ = __getitem__ = __int__ = __index__ = __float__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __rmod__ = _refuse
    __floordiv__ = __rfloordiv__ = __truediv__ = __rtruediv__ = __pow__ = __rpow__ = __neg__ = _refuse
    __fspath__ = __str__ = __repr__ = __format__ = _refuse  # type: ignore[assignment]


class Findings:
    """What is wrong, in the order of the files."""

    def __init__(self, tree: Tree):
        self._tree = tree
        self._found: list[tuple[tuple[int, int, int], Diagnostic]] = []
        self.more = 0

    def __bool__(self) -> bool:
        return bool(self._found)

    @property
    def full(self) -> bool:
        return len(self._found) >= MAX_FINDINGS

    def add(
        self, code: str, path: Path, message: str, *, at: str = "value", help: str = "", notes: tuple[str, ...] = ()
    ) -> None:
        """A finding at a path, or at the nearest table around it that is written somewhere.

        at: "value" or "key", the part of the statement that is at fault.
        """
        if self.full:
            self.more += 1
            return
        place = self._tree.places.get(path)
        while place is None and path:
            path, at = path[:-1], "key"
            place = self._tree.places.get(path)
        if place is None:
            self._found.append(((0, 0, 0), self._tree.main.finding(code, message, None, help=help, notes=notes)))
            return
        span = place.mark.key if at == "key" else place.mark.value
        self._found.append(
            ((place.layer, span.line, span.column), place.source.finding(code, message, span, help=help, notes=notes))
        )

    def sorted(self) -> list[Diagnostic]:
        found = [diagnostic for _, diagnostic in sorted(self._found, key=lambda item: item[0])]
        if self.more:
            found.append(self._tree.main.finding("N0100", f"{self.more} more findings are not shown", None))
        return found


def structure(tree: Tree, findings: Findings) -> Any:
    """The registry's Config of a tree; a Broken in place of every part that is wrong."""
    return _section(tree.data, (), "", findings)


def dotted(path: Path) -> str:
    return ".".join(str(part) for part in path)


def fields_of(cls: type) -> dict[str, "attrs.Attribute[Any]"]:
    """The fields that a config may write, by name."""
    return {field.name: field for field in attrs.fields(cls) if field.init}


def is_section(field: "attrs.Attribute[Any]") -> bool:
    return bool(field.metadata.get("section"))


def is_array(field: "attrs.Attribute[Any]") -> bool:
    """Whether a section is an array of tables."""
    return is_section(field) and typing.get_origin(field.type) is tuple


def _section(data: Any, path: Path, table: str, findings: Findings) -> Any:
    """One section. table: its name in the closed table, without indexes."""
    name = dotted(path)
    if not isinstance(data, dict):
        message = f"`{name}` is a section, found {_found(data)}"
        findings.add("N0114", path, message, help=f"write [{name}] on its own line")
        return Broken()
    kind = _kind(data, path, table, findings)
    if isinstance(kind, Broken):
        return kind
    cls = TABLE[table][kind]
    fields = fields_of(cls)
    for key in data:
        if key not in fields and not (key == "kind" and kind is not None):
            _unknown(key, path, table, kind, findings)
    values = {}
    for field in fields.values():
        here = (*path, field.name)
        if is_section(field):
            values[field.name] = _subsection(data, here, f"{table}.{field.name}".lstrip("."), field, findings)
        elif field.name in data:
            values[field.name] = _key(data[field.name], here, field, findings)
        elif field.default is attrs.NOTHING:
            message = f"missing key `{field.name}` in {_called(path, kind)}"
            findings.add("N0110", path, message, at="key", help=f"add it: {field.metadata['help']}")
            values[field.name] = Broken()
    return cls(**values)


def _called(path: Path, kind: str | None) -> str:
    return (f"[{dotted(path)}]" if path else "the file") + (f' of kind "{kind}"' if kind else "")


def _kind(data: dict[str, Any], path: Path, table: str, findings: Findings) -> Any:
    """The kind that a section says, or implies; a Broken where it has none that exists."""
    kinds = TABLE[table]
    named = [k for k in kinds if k is not None]
    options = ", ".join(f'"{k}"' for k in named)
    if "kind" not in data:
        if None in kinds:
            return None
        if implies_kind(table):
            return named[0]
        findings.add(
            "N0113", path, f"[{dotted(path)}] does not say its kind", at="key", help=f"add `kind`, one of: {options}"
        )
        return Broken()
    kind = data["kind"]
    here = (*path, "kind")
    if not named:
        findings.add("N0112", here, f"[{dotted(path)}] takes no `kind`", at="key", help="remove it")
        return None
    if not isinstance(kind, str):
        findings.add("N0114", here, f"`kind` must be a string, found {_found(kind)}", help=f"one of: {options}")
        return Broken()
    if kind not in named:
        near = closest(kind, named)
        way = f'did you mean "{near}"?' if near else f"one of: {options}"
        notes = (f"kinds of [{dotted(path)}]: {options}",) if near else ()
        findings.add("N0113", here, f'unknown kind "{shown(kind)}" of [{dotted(path)}]', help=way, notes=notes)
        return Broken()
    return kind


def implies_kind(table: str) -> bool:
    """Whether a section may leave out its kind: it has one only, and the section itself may be left out."""
    parent, _, name = table.rpartition(".")
    fields = [fields_of(cls).get(name) for cls in TABLE[parent].values()] if len(TABLE[table]) == 1 else []
    return any(field is not None and field.metadata.get("implied") for field in fields)


def _subsection(data: dict[str, Any], here: Path, table: str, field: "attrs.Attribute[Any]", findings: Findings) -> Any:
    name = str(here[-1])
    if name in data:
        if not is_array(field):
            return _section(data[name], here, table, findings)
        if not isinstance(data[name], list):
            findings.add(
                "N0114", here, f"`{dotted(here)}` is an array of tables, found {_found(data[name])}",
                help=f"write [[{dotted(here)}]] for each",
            )  # fmt: skip
            return Broken()
        return tuple(_section(item, (*here, index), table, findings) for index, item in enumerate(data[name]))
    if field.default is None:
        return None
    if field.metadata["implied"]:
        return _section({}, here, table, findings)
    header = f"[[{dotted(here)}]]" if is_array(field) else f"[{dotted(here)}]"
    findings.add("N0111", here[:-1], f"missing section {header}", at="key", help=f"add it: {field.metadata['help']}")
    return Broken()


def closest(word: str, words: list[str], cutoff: float = 0.6) -> str | None:
    """The word that a misspelling is nearest to, if one is near."""
    import difflib

    near = difflib.get_close_matches(word[:200].lower(), words, n=1, cutoff=cutoff)
    return near[0] if near else None


def _unknown(key: str, path: Path, table: str, kind: str | None, findings: Findings) -> None:
    """An unknown key: the nearest of this section, or the sections that have a key of this name."""
    if findings.full:
        findings.more += 1
        return
    fields = fields_of(TABLE[table][kind])
    names = [*fields, *(["kind"] if kind else [])]
    own_kinds = [f'kind = "{k}"' for k, cls in TABLE[table].items() if k is not None and key in fields_of(cls)]
    others = {other: kinds.values() for other, kinds in TABLE.items() if other != table}
    elsewhere = [f"[{other}]" for other, specs in others.items() if any(key in fields_of(cls) for cls in specs)]
    near = closest(key, names, 0.75) or (None if elsewhere or own_kinds else closest(key, names))
    if own_kinds:
        way = f"`{key}` belongs to {' and '.join(own_kinds)}"
    elif near:
        way = f"did you mean `{near}`?"
    elif elsewhere:
        way = f"`{key}` is a key of {', '.join(elsewhere[:4])}"
    else:
        way = "remove it"
    notes = []
    keys = [f"{n}{' (required)' if _required(f) else ''}" for n, f in fields.items() if not is_section(f)]
    sections = [f"[{dotted((*path, n))}]" for n, f in fields.items() if is_section(f)]
    of = f' of kind "{kind}"' if kind else f" of [{dotted(path)}]" if path else ""
    if keys:
        notes.append(f"keys{of}: {', '.join(keys)}")
    if sections:
        notes.append(f"sections{' below it' if path else ''}: {', '.join(sections)}")
    where = f"`{dotted(path)}`" if path else "the file"
    message = f"unknown key `{shown(key)}` in {where}"
    findings.add("N0112", (*path, key), message, at="key", help=way, notes=tuple(notes))


def _required(field: "attrs.Attribute[Any]") -> bool:
    return field.default is attrs.NOTHING


def _found(value: Any) -> str:
    """What a value is, for a message."""
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, int):
        return f"the integer {value}"
    if isinstance(value, float):
        return f"the float {value!r}"
    if isinstance(value, str):
        return f'the string "{shown(value, 40)}"'
    return "an array" if isinstance(value, list) else "a table"


def type_of(field: "attrs.Attribute[Any]") -> Any:
    """A key's type without `| None`: absence is not a value."""
    if isinstance(field.type, types.UnionType):
        return next(arm for arm in typing.get_args(field.type) if arm is not types.NoneType)
    return field.type


def _key(value: Any, here: Path, field: "attrs.Attribute[Any]", findings: Findings) -> Any:
    wanted = type_of(field)
    name = str(here[-1])
    if typing.get_origin(wanted) is not tuple:
        return _scalar(value, wanted, name, here, field, findings)
    arms = typing.get_args(wanted)
    if not isinstance(value, list):
        noun = NOUNS[arms[0]].split()[-1]
        findings.add("N0114", here, f"`{name}` must be an array of {noun}s, found {_found(value)}", help="write [...]")
        return Broken()
    if arms[-1] is not Ellipsis and len(value) != len(arms):
        findings.add("N0114", here, f"`{name}` must have {len(arms)} elements, found {len(value)}")
        return Broken()
    items = [_scalar(v, arms[0], name, (*here, i), field, findings) for i, v in enumerate(value)]
    return Broken() if any(isinstance(item, Broken) for item in items) else tuple(items)


def _scalar(value: Any, wanted: type, name: str, here: Path, field: "attrs.Attribute[Any]", findings: Findings) -> Any:
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        message = f"`{name}` must be {NOUNS[wanted]}, found {_found(value)}"
        findings.add("N0114", here, message, help=_cure(value, wanted))
        return Broken()
    for code, message, way in _bounds(value, name, field.metadata):
        findings.add(code, here, message, help=way)
        return Broken()
    return value + 0.0 if isinstance(value, float) else value  # -0.0 + 0.0 is 0.0: what runs is what is hashed


def _cure(value: Any, wanted: type) -> str:
    if isinstance(value, str) and wanted in (int, float) and value.strip().lstrip("+-").isdigit():
        return f"remove the quotes: {value.strip()}"
    if isinstance(value, str) and wanted is bool and value.lower() in ("true", "false"):
        return f"remove the quotes: {value.lower()}"
    if isinstance(value, float) and wanted is int and value.is_integer() and abs(value) < 2**53:
        return f"write {int(value)}"
    if wanted is str and isinstance(value, (bool, int, float)):
        return f'put quotes around it: "{str(value).lower()}"'
    return ""


def _bounds(value: Any, name: str, limits: Any) -> Iterator[tuple[str, str, str]]:
    if isinstance(value, str):
        choices = limits["choices"]
        if choices is not None and value not in choices:
            options = ", ".join(f'"{c}"' for c in choices)
            near = closest(value, list(choices))
            way = f'did you mean "{near}"?' if near else f"one of: {options}"
            yield "N0116", f'`{name}` = "{shown(value)}" is not one of {options}', way
        elif not value.strip():
            yield "N0115", f"`{name}` is empty", limits["help"]
        return
    if limits["minimum"] is not None and value < limits["minimum"]:
        yield "N0115", f"`{name}` = {value} is below {limits['minimum']}", f"the least that works: {limits['minimum']}"
    if limits["above"] is not None and value <= limits["above"]:
        yield "N0115", f"`{name}` = {value} is not above {limits['above']}", limits["help"]
    if limits["maximum"] is not None and value > limits["maximum"]:
        yield "N0115", f"`{name}` = {value} is above {limits['maximum']}", f"the most that works: {limits['maximum']}"
    if limits["below"] is not None and value >= limits["below"]:
        yield "N0115", f"`{name}` = {value} is not below {limits['below']}", limits["help"]


def components(spec: Any, path: Path = ()) -> Iterator[tuple[Path, Component]]:
    """Every section of a structured tree with its path, parents first, in the table's order."""
    if isinstance(spec, Broken) or spec is None:
        return
    yield path, spec
    for field in fields_of(type(spec)).values():
        if not is_section(field):
            continue
        part = getattr(spec, field.name)
        if isinstance(part, tuple):
            for index, item in enumerate(part):
                yield from components(item, (*path, field.name, index))
        else:
            yield from components(part, (*path, field.name))


def problems_of(spec: Component, config: Any, path: Path) -> Iterator[Problem]:
    """A section's cross-section findings, as far as its parts are there."""
    try:
        yield from spec.check(config, dotted(path))
    except BrokenPart:
        return
