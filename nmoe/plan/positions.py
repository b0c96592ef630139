"""Where each key and value stands in a TOML text: a scanner beside the parser.

The parser (tomli) decides what is valid and what it means; it does not say where a value stood.
This scanner walks the same text, understands just enough of it (headers, keys, strings, brackets)
and records a `Mark` for every path. It is only lexical, so it can also be run over a text that
the parser refused: it then stops where it no longer understands, and what it has seen so far
tells which statement the fault is in.

A path is a tuple of keys and, inside arrays, indexes: ("data", "stages", 0, "weights").
Lines and columns count from 1, in characters. Line ends must be "\\n" already.
"""

import re

import attrs
import tomli

Path = tuple[str | int, ...]

SPACE = re.compile(r"[ \t]*")
BLANK = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
BARE = re.compile(r"[A-Za-z0-9_-]+")
WORD = re.compile(r"[^\s,\]}#]+(?: [0-9][^\s,\]}#]*)?")
STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"""(?:"{0,2})' r"|'''.*?'''(?:'{0,2})" r'|"(?:\\.|[^"\\\n])*"' r"|'[^'\n]*'",
    re.DOTALL,
)


@attrs.frozen
class Span:
    """A stretch of one line."""

    line: int
    column: int
    width: int


@attrs.frozen
class Mark:
    """Where a path is written: its key (or header) and its value. header: the path opens with `[...]`."""

    key: Span
    value: Span
    header: bool = False


@attrs.frozen
class Statement:
    """One `key = value` or header, in the order of the text."""

    offset: int
    path: Path
    key: Span


class _StopScan(Exception):
    """The text is not understood from here on."""


class Scanner:
    """Marks and statements of a text; `complete` says whether it was understood to its end."""

    def __init__(self, text: str):
        self.text = text
        self.marks: dict[Path, Mark] = {}
        self.statements: list[Statement] = []
        self._at = 0
        self._lengths: dict[Path, int] = {}  # of the arrays of tables
        self._line, self._line_start = 1, 0
        try:
            self._document()
            self.complete = True
        except _StopScan:
            self.complete = False

    def _span(self, start: int, stop: int | None = None) -> Span:
        """The span from start to stop (or to here). Asked for in the order of the text: lines are counted once."""
        newlines = self.text.count("\n", self._line_start, start)
        if newlines:
            self._line += newlines
            self._line_start = self.text.rfind("\n", 0, start) + 1
        return self._to(Span(self._line, start - self._line_start + 1, 1), start, self._at if stop is None else stop)

    def _to(self, span: Span, start: int, stop: int) -> Span:
        """A span that begins at `start`, extended to `stop` or the end of its line."""
        end = self.text.find("\n", start, stop)
        return Span(span.line, span.column, max((stop if end < 0 else end) - start, 1))

    def _skip(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self.text, self._at)
        assert match is not None
        self._at = match.end()

    def _peek(self, word: str) -> bool:
        return self.text.startswith(word, self._at)

    def _expect(self, word: str) -> None:
        if not self._peek(word):
            raise _StopScan
        self._at += len(word)

    def _document(self) -> None:
        table: Path = ()
        while True:
            self._skip(BLANK)
            if self._at >= len(self.text):
                return
            if self._peek("["):
                table = self._header()
            else:
                self._pair(table)
            self._skip(SPACE)
            if self._at < len(self.text) and not (self._peek("\n") or self._peek("#")):
                raise _StopScan

    def _header(self) -> Path:
        start = self._at
        bracket, closing = ("[[", "]]") if self._peek("[[") else ("[", "]")
        self._at += len(bracket)
        parts = self._key()
        self._skip(SPACE)
        self._expect(closing)
        span = self._span(start)
        mark = Mark(span, span, header=True)
        path: Path = ()
        for index, (name, _, _) in enumerate(parts):
            path = (*path, name)
            last = index == len(parts) - 1
            if last and bracket == "[[":
                self._lengths[path] = self._lengths.get(path, 0) + 1
            known = self.marks.get(path)
            if known is None or (last and bracket == "[" and not known.header):
                self.marks[path] = mark
            if path in self._lengths:
                path = (*path, self._lengths[path] - 1)
                self.marks.setdefault(path, mark)
        self.statements.append(Statement(start, path, span))
        return path

    def _pair(self, table: Path) -> None:
        start = self._at
        parts = self._key()
        self._skip(SPACE)
        path, spans = table, []
        for name, begin, end in parts:
            path = (*path, name)
            spans.append((path, self._span(begin, end)))
        self.statements.append(Statement(start, path, spans[-1][1]))
        self._expect("=")
        self._skip(SPACE)
        begin = self._at
        opening = self._span(begin, begin + 1)
        for parent, span in spans[:-1]:
            self.marks.setdefault(parent, Mark(span, span))
        self.marks[path] = Mark(spans[-1][1], spans[-1][1])
        self._value(path)
        self.marks[path] = Mark(spans[-1][1], self._to(opening, begin, self._at))

    def _key(self) -> list[tuple[str, int, int]]:
        parts = []
        while True:
            self._skip(SPACE)
            start = self._at
            if self._peek('"') or self._peek("'"):
                raw = self._string()
                try:
                    name = tomli.loads(f"x={raw}")["x"]
                except tomli.TOMLDecodeError as error:
                    raise _StopScan from error
            else:
                match = BARE.match(self.text, self._at)
                if match is None:
                    raise _StopScan
                name, self._at = match.group(), match.end()
            parts.append((name, start, self._at))
            self._skip(SPACE)
            if not self._peek("."):
                self._at = parts[-1][2]
                return parts
            self._at += 1

    def _string(self) -> str:
        match = STRING.match(self.text, self._at)
        if match is None:
            raise _StopScan
        self._at = match.end()
        return match.group()

    def _value(self, path: Path) -> None:
        if self._peek('"') or self._peek("'"):
            self._string()
        elif self._peek("["):
            self._array(path)
        elif self._peek("{"):
            self._inline_table(path)
        else:
            match = WORD.match(self.text, self._at)
            if match is None:
                raise _StopScan
            self._at = match.end()

    def _array(self, path: Path) -> None:
        self._at += 1
        index = 0
        while True:
            self._skip(BLANK)
            if self._peek("]"):
                break
            start, item = self._at, (*path, index)
            opening = self._span(start, start + 1)
            self._value(item)
            span = self._to(opening, start, self._at)
            self.marks[item] = Mark(span, span)
            index += 1
            self._skip(BLANK)
            if not self._peek(","):
                break
            self._at += 1
        self._expect("]")

    def _inline_table(self, path: Path) -> None:
        self._at += 1
        while True:
            self._skip(BLANK)
            if self._peek("}"):
                break
            self._pair(path)
            self._skip(BLANK)
            if not self._peek(","):
                break
            self._at += 1
        self._expect("}")
