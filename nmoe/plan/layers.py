"""One tree out of several texts: the parents that `extends` names, the file, and `--set`.

Layers are laid over each other from the oldest parent to `--set`. Tables merge key by key and the
later layer wins; arrays are replaced whole. A layer that changes the `kind` of a section, or the
platform's `target`, starts that section afresh: nothing the earlier layers wrote there or below it
carries over, because keys of one kind mean nothing, or something else, to another.

`extends = "base.toml"` stands at the top of a file and names one parent, relative to that file.
`--set section.key=VALUE` is one TOML statement; it may set a whole table, and it cannot set
`extends`. Two `--set` of one key are refused: which of them was meant cannot be known.
"""

from collections.abc import Iterator, Sequence
from os.path import normpath, relpath
from pathlib import Path as FilePath
from typing import Any

import attrs

from nmoe.errors import ConfigError, Diagnostic
from nmoe.plan.positions import Mark, Path
from nmoe.plan.source import Source, decode, parse, read, shown
from nmoe.registry.table import TABLE

MAX_PARENTS = 8


@attrs.frozen
class Place:
    """Where a path of the merged tree was written. layer: 0 is the main file, its parents follow, then `--set`."""

    source: Source
    mark: Mark
    layer: int

    @property
    def origin(self) -> str:
        """`file:line`, or `--set`."""
        return self.source.label if self.source.label == "--set" else f"{self.source.label}:{self.mark.key.line}"


@attrs.define(eq=False)
class Tree:
    """The merged data, and the place of every path in it."""

    main: Source
    data: dict[str, Any]
    places: dict[Path, Place]
    extended: bool = False


def load(path: FilePath, name: str, sets: Sequence[str] = ()) -> Tree:
    """The tree of a file."""
    return _laid(read(path, name, path.name), path, sets)


def load_text(text: str | bytes, name: str, sets: Sequence[str] = ()) -> Tree:
    """The tree of a text; `extends` is relative to the directory of its name."""
    raw = text.encode("utf-8", errors="surrogatepass") if isinstance(text, str) else text
    return _laid(parse(decode(raw, name), name, FilePath(name).name), FilePath(name), sets)


def _laid(main: Source, path: FilePath, sets: Sequence[str]) -> Tree:
    files = [main, *_parents(main, path)]
    tree = Tree(main, {}, {}, extended=len(files) > 1)
    for layer in reversed(range(len(files))):
        source = files[layer]
        source.data.pop("extends", None)
        _lay(tree, source, layer)
    for source in _set_sources(sets):
        _lay(tree, source, len(files))
    return tree


def _parents(child: Source, path: FilePath) -> Iterator[Source]:
    """The parents of a file, nearest first."""
    main = path
    seen = [normpath(path.absolute())]
    while "extends" in child.data:
        span = child.marks[("extends",)].value
        value = child.data["extends"]
        if not isinstance(value, str) or not value:
            raise ConfigError(
                child.finding("N0108", "`extends` takes the path of one file", span, help='write extends = "base.toml"')
            )
        path = path.parent / value
        where = normpath(path.absolute())
        if where in seen:
            raise ConfigError(
                child.finding("N0108", f"`{value}` extends itself", span, help="remove one `extends` of the circle")
            )
        if len(seen) > MAX_PARENTS:
            raise ConfigError(
                child.finding("N0108", f"more than {MAX_PARENTS} parents", span, help="join some of them into one file")
            )
        seen.append(where)
        label = relpath(where, normpath(main.absolute().parent)).replace("\\", "/")
        name = normpath(path) if not path.is_absolute() else str(path)
        try:
            parent = read(path, name, label)
        except ConfigError as error:
            if error.diagnostics[0].code != "N0101":
                raise
            first = error.diagnostics[0]
            raise ConfigError(child.finding("N0108", first.message, span, help=first.help)) from error
        yield parent
        child = parent


def _set_sources(sets: Sequence[str]) -> Iterator[Source]:
    """One small source for each `--set`, whose line number is its place among them."""
    seen: dict[Path, int] = {}
    for number, argument in enumerate(sets, 1):
        form = "write --set section.key=VALUE, where VALUE is TOML"
        bad = Source(name="--set", label="--set", text=argument, first_line=number)
        span = attrs.evolve(bad.span_at(0), line=number, width=max(len(argument), 1))
        if "\n" in argument or "\r" in argument or "\0" in argument:
            raise ConfigError(bad.finding("N0109", "`--set` takes one line", span, help=form))
        if "=" not in argument:
            raise ConfigError(bad.finding("N0109", "`--set` without a value", span, help=form))
        if argument.lstrip().startswith("["):
            raise ConfigError(bad.finding("N0109", "`--set` takes no section header", span, help=form))
        try:
            argument.encode("utf-8")
            source = parse(argument, "--set", "--set", first_line=number)
        except UnicodeEncodeError as error:
            raise ConfigError(bad.finding("N0109", "`--set` with bytes that are not UTF-8", span, help=form)) from error
        except ConfigError as error:
            raise ConfigError([_as_set(d, argument) for d in error.diagnostics]) from error
        for path in _leaves(source.data, ()):
            mark = source.marks[path]
            if path[0] == "extends":
                message = "`extends` belongs into a file"
                raise ConfigError(source.finding("N0109", message, mark.key, help="write it at the top of the config"))
            if path in seen:
                message = f"`{shown('.'.join(map(str, path)))}` is set twice"
                note = f"first by --set number {seen[path]}"
                raise ConfigError(source.finding("N0109", message, mark.key, help="remove one of them", notes=(note,)))
            seen[path] = number
        yield source


def _leaves(value: dict[str, Any], path: Path) -> Iterator[Path]:
    """The paths of a table's values, its sub-tables' included."""
    for name, item in value.items():
        if isinstance(item, dict) and item:
            yield from _leaves(item, (*path, name))
        else:
            yield (*path, name)


def _as_set(diagnostic: Diagnostic, argument: str) -> Diagnostic:
    """A parser's finding about the text of a `--set`; a bare word gets the way a shell passes a string."""
    key, _, value = argument.partition("=")
    way = diagnostic.help
    if diagnostic.code == "N0105" and value.strip()[:1].isalpha() and argument == shown(argument, 200):
        way = f"a string needs TOML's quotes inside the shell's: --set '{key.strip()}=\"{value.strip()}\"'"
    code = "N0109" if diagnostic.code == "N0105" else diagnostic.code
    return attrs.evolve(diagnostic, code=code, help=way or "write --set section.key=VALUE, where VALUE is TOML")


def _lay(tree: Tree, source: Source, layer: int) -> None:
    _merge(tree, tree.data, source.data, (), source, layer)


def _kind(section: str, table: dict[str, Any]) -> Any:
    """The kind that a table writes; the only one there is, where it writes none."""
    kinds = TABLE.get(section, {})
    return table.get("kind", next(iter(kinds)) if len(kinds) == 1 else None)


def _another_kind(section: str, before: dict[str, Any], value: dict[str, Any]) -> bool:
    """Whether a later layer's table says that the section is of another kind."""
    if section == "platform":
        return "target" in value and before.get("target") != value["target"]
    return "kind" in value and _kind(section, before) != value["kind"]


def _merge(tree: Tree, old: dict[str, Any], new: dict[str, Any], path: Path, source: Source, layer: int) -> None:
    for name, value in new.items():
        here = (*path, name)
        before = old.get(name)
        mark = source.marks.get(here)
        if isinstance(value, dict) and isinstance(before, dict):
            section = ".".join(str(p) for p in here)
            if _another_kind(section, before, value):
                _forget(tree, here, before)
                before.clear()
            if mark is not None and (mark.header or here not in tree.places):
                tree.places[here] = Place(source, mark, layer)
            _merge(tree, before, value, here, source, layer)
            continue
        if name in old:
            _forget(tree, here, before)
        if mark is not None:
            tree.places[here] = Place(source, mark, layer)
        if isinstance(value, dict):
            old[name] = {}
            _merge(tree, old[name], value, here, source, layer)
        else:
            old[name] = value
            for inner in _inside(value, here):
                if inner in source.marks:
                    tree.places[inner] = Place(source, source.marks[inner], layer)


def _inside(value: Any, path: Path) -> Iterator[Path]:
    """Every path below a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield (*path, name)
        yield from _inside(item, (*path, name))


def _forget(tree: Tree, path: Path, value: Any) -> None:
    for inner in (path, *_inside(value, path)):
        tree.places.pop(inner, None)
