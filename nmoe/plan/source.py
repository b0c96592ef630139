"""One TOML text: its limits, its data, and the position of everything in it.

What a text costs is bounded before it is parsed: its size, the depth of its brackets, the length
of a word and the parts of a dotted key are capped by one linear pass, because the parser recurses
into brackets and is quadratic in dotted keys. Then tomli decides whether it is valid, and the
scanner of `positions` finds where each value stands, so that every finding has a line and a caret.

Values that TOML has and a config cannot have are refused here: dates and times (nothing in a plan
is one), nan and inf, and integers beyond 2^53 - 1, which JSON readers would round.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any

import attrs
import tomli

from nmoe.errors import ConfigError, Diagnostic
from nmoe.plan.canonical import MAX_INT
from nmoe.plan.positions import Mark, Path, Scanner, Span

MAX_BYTES = 1 << 20
MAX_DEPTH = 16
MAX_WORD = 256
MAX_PARTS = 16
LINE_SHOWN = 120

TOKEN = re.compile(
    r'(?P<string>"""(?:\\.|[^\\])*?(?:"""(?:"{0,2})|\Z)'
    r"|'''.*?(?:'''(?:'{0,2})|\Z)"
    r'|"(?:\\.|[^"\\\n])*"?'
    r"|'[^'\n]*'?)"
    r"|(?P<comment>\#[^\n]*)"
    r"|(?P<open>[\[{])|(?P<close>[\]}])|(?P<dot>\.)|(?P<separator>[,=\n])"
    r"|(?P<word>[^\s\"'\#\[\]{},=.]+)",
    re.DOTALL,
)


def shown(text: str, limit: int = 60) -> str:
    """A user's text inside a message: one line, printable, not too long."""
    clean = "".join(c if c.isprintable() else "?" for c in text[: limit + 1])
    return clean if len(clean) <= limit else clean[: limit - 3] + "..."


@attrs.define(eq=False)
class Source:
    """A text and what was found in it.

    name: how messages call it (the path as the user gave it, or `--set`).
    label: how origins call it (relative to the main file, so that no plan depends on a directory).
    """

    name: str
    label: str
    text: str
    first_line: int = 1
    data: dict[str, Any] = attrs.field(factory=dict)
    marks: dict[Path, Mark] = attrs.field(factory=dict)
    _lines: list[str] | None = None

    def line_text(self, line: int) -> str:
        if self._lines is None:
            self._lines = self.text.split("\n")
        index = line - self.first_line
        return self._lines[index] if 0 <= index < len(self._lines) else ""

    def finding(
        self, code: str, message: str, span: Span | None, help: str = "", notes: tuple[str, ...] = ()
    ) -> Diagnostic:
        """A diagnostic at a span of this text, or about the whole of it."""
        if span is None:
            return Diagnostic(code=code, message=message, path=self.name, help=help, notes=notes)
        text, column = self.line_text(span.line), span.column
        if len(text) > LINE_SHOWN:
            cut = max(0, min(column - 1 - LINE_SHOWN // 2, len(text) - LINE_SHOWN))
            text, column = text[cut : cut + LINE_SHOWN], column - cut
        text = "".join(c if c.isprintable() else " " for c in text).rstrip()
        column = min(column, len(text) + 1)
        width = max(1, min(span.width, len(text) - column + 1))
        return Diagnostic(
            code=code, message=message, path=self.name, line=span.line, column=column, width=width, source=text,
            help=help, notes=notes,
        )  # fmt: skip

    def span_at(self, offset: int) -> Span:
        """The character at an offset; the last one of the text where it ends there."""
        offset = min(offset, max(len(self.text.rstrip("\n")) - 1, 0)) if offset >= len(self.text) else offset
        line_start = self.text.rfind("\n", 0, offset) + 1
        return Span(self.text.count("\n", 0, offset) + self.first_line, offset - line_start + 1, 1)


def read(path: FilePath, name: str, label: str) -> Source:
    """The parsed source of a file. Raises ConfigError with everything that is wrong with it as TOML."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(
            Diagnostic(
                code="N0101", message=f"cannot read `{shown(name, 200)}`: {reason.lower()}", help=_like(path, name)
            )
        ) from error
    return parse(decode(raw, name), name, label)


def _like(path: FilePath, name: str) -> str:
    """A file of the same directory with nearly that name."""
    import difflib

    try:
        if path.is_dir():
            return "name a TOML file"
        names = [p.name for p in path.parent.iterdir() if p.suffix == ".toml"] if path.parent.is_dir() else []
    except OSError:
        names = []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean `{FilePath(name).with_name(near[0])}`?" if near else "check the path"


def decode(raw: bytes, name: str) -> str:
    """The text of a file's bytes: at most 1 MiB of UTF-8 without byte order mark or NUL."""
    whole = Source(name=name, label=name, text=raw.decode("utf-8", errors="replace"))
    if len(raw) > MAX_BYTES:
        way = "a config is a page of text; check the path"
        raise ConfigError(whole.finding("N0102", "a config of more than 1 MiB", None, help=way))
    if raw.startswith(b"\xef\xbb\xbf"):
        message = "the file begins with a byte order mark"
        raise ConfigError(whole.finding("N0103", message, Span(1, 1, 1), help="save it as UTF-8 without BOM"))
    for wide in (b"\xff\xfe", b"\xfe\xff"):
        if raw.startswith(wide):
            raise ConfigError(whole.finding("N0103", "the file is UTF-16", Span(1, 1, 1), help="save it as UTF-8"))
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8")
        span = Span(before.count("\n") + 1, len(before) - before.rfind("\n"), 1)
        message = f"byte 0x{raw[error.start]:02x} is not UTF-8"
        raise ConfigError(whole.finding("N0103", message, span, help="save the file as UTF-8")) from error
    at = text.find("\0")
    if at >= 0:
        raise ConfigError(whole.finding("N0103", "a NUL character", whole.span_at(at), help="remove it"))
    return text


def parse(text: str, name: str, label: str, first_line: int = 1) -> Source:
    """Data and marks of a text. first_line: the number of its first line in messages."""
    source = Source(name=name, label=label, text=text.replace("\r\n", "\n"), first_line=first_line)
    _check_limits(source)
    try:
        source.data = tomli.loads(source.text)
    except tomli.TOMLDecodeError as error:
        raise ConfigError(_syntax(source, error)) from error
    except (ValueError, RecursionError, OverflowError) as error:
        raise ConfigError(source.finding("N0105", f"not TOML: {shown(str(error).lower())}", None)) from error
    scanner = Scanner(source.text)
    shift = first_line - 1
    source.marks = {path: _shifted(mark, shift) for path, mark in scanner.marks.items()} if shift else scanner.marks
    findings = list(_unfit(source, source.data, ()))
    if findings:
        raise ConfigError(findings)
    return source


def _shifted(mark: Mark, lines: int) -> Mark:
    key, value = (attrs.evolve(span, line=span.line + lines) for span in (mark.key, mark.value))
    return Mark(key, value, mark.header)


def _check_limits(source: Source) -> None:
    """Refuse what would make the parser slow or recurse: one pass, linear in the text."""
    depth = dots = 0
    for token in TOKEN.finditer(source.text):
        kind = token.lastgroup
        if kind == "open":
            depth, dots = depth + 1, 0
            if depth > MAX_DEPTH:
                message = f"brackets nested more than {MAX_DEPTH} deep"
                raise ConfigError(source.finding("N0104", message, source.span_at(token.start())))
        elif kind == "close":
            depth, dots = max(depth - 1, 0), 0
        elif kind == "separator":
            dots = 0
        elif kind == "dot":
            dots += 1
            if dots >= MAX_PARTS:
                message = f"a key of more than {MAX_PARTS} parts"
                raise ConfigError(source.finding("N0104", message, source.span_at(token.start())))
        elif kind == "word" and token.end() - token.start() > MAX_WORD:
            span = source.span_at(token.start())
            message = f"a word of {token.end() - token.start()} characters, more than {MAX_WORD}"
            raise ConfigError(source.finding("N0104", message, attrs.evolve(span, width=MAX_WORD)))


REPEATS = ("Cannot overwrite", "Cannot declare", "Duplicate inline", "Cannot mutate")
SAYS = {
    "Invalid value": ("a value that is not TOML", "strings need quotes; the words true and false are lowercase"),
    "Invalid statement": ("neither a key nor a section", "write `key = value` or `[section]`"),
    "Unterminated string": ("a string without an end", "close the quotes"),
    "Unclosed array": ("an array without an end", "close the bracket"),
    "Unclosed inline table": ("an inline table without an end", "close the brace"),
    "Expected newline or end of document after a statement": (
        "something follows the value",
        "one statement a line; a comment begins with #; a string needs quotes",
    ),
    "Illegal character '\\n'": ("a string does not end on its line", "close the quotes"),
}


def _syntax(source: Source, error: tomli.TOMLDecodeError) -> Diagnostic:
    """The parser's finding in words of ours, at its place; a repetition at the key that repeats."""
    scanner = Scanner(source.text)
    before = [s for s in scanner.statements if s.offset < max(error.pos, 1)]
    shift = source.first_line - 1
    statement = before[-1] if before else None
    if error.msg.startswith(REPEATS) and statement is not None:
        again = attrs.evolve(statement.key, line=statement.key.line + shift)
        name = shown(".".join(str(p) for p in statement.path))
        first = next((s for s in before[:-1] if s.path == statement.path), None)
        if first is None:
            first = next((s for s in before[:-1] if s.path[: len(statement.path)] == statement.path), None)
        notes = (f"`{name}` is first written in line {first.key.line + shift}",) if first else ()
        return source.finding("N0106", f"`{name}` is written twice", again, help="remove one of them", notes=notes)
    message, way = SAYS.get(error.msg, ("", ""))
    if not message:
        message = "not TOML: " + shown(error.msg[:1].lower() + error.msg[1:], 100)
    offset = error.pos
    if error.msg == 'Expected "\'"' and statement is not None:
        # The parser looks for the closing quote to the end of the text; the fault is on the line of the opening one.
        offset = source.text.find("\n", statement.offset)
        message, way = SAYS["Illegal character '\\n'"]
    span = source.span_at(offset)
    notes = ()
    if statement is not None and statement.key.line + shift < span.line:
        notes = (f"in the statement that begins in line {statement.key.line + shift}",)
    return source.finding("N0105", message, span, help=way, notes=notes)


def _unfit(source: Source, value: Any, path: Path) -> Iterator[Diagnostic]:
    """Values that TOML allows and no config may have."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _unfit(source, item, (*path, name))
        return
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unfit(source, item, (*path, index))
        return
    message = way = ""
    if isinstance(value, bool):
        return
    if isinstance(value, int):
        if abs(value) > MAX_INT:
            message, way = "an integer beyond 2^53 - 1", "the largest that every reader keeps exactly is 2^53 - 1"
    elif isinstance(value, float):
        if not math.isfinite(value):
            message, way = f"`{value}` is not a finite number", "write a number"
    elif isinstance(value, str):
        if any(ord(c) < 32 or ord(c) == 127 for c in value):
            message, way = "a string with a control character", "remove it"
    else:
        message, way = "a date or time; no key takes one", "put quotes around it if it is meant as text"
    if message:
        mark = source.marks.get(path)
        yield source.finding("N0107", message, mark.value if mark else None, help=way)
