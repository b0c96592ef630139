"""What went wrong, where, and the way out: the one type that every failure of nmoe speaks through.

A `Diagnostic` is one finding. It names the thing (message), the place (a file with line and
column, or any other noun such as an object's name), and the way out (help). An `NmoeError`
carries one or more of them to the command line, which prints them and exits with `exit_code`:

    1  a run failed (data damaged, a gradient that is not finite, a lock that is held)
    2  the input is not valid (a config, an argument): nothing has been started

The rendering follows the Rust compiler's layout:

    error[N0112]: unknown key `intermediate` in `model.moe.experts`
      --> configs/moonlet.toml:23
       |
    23 | intermediate = 1408
       | ^^^^^^^^^^^^
       = help: did you mean `intermediate_size`?
"""

from collections.abc import Iterable

import attrs


@attrs.frozen(kw_only=True)
class Diagnostic:
    """One finding.

    code: "N" and four digits; stable, so that a reader can search for it.
    message: lowercase, no full stop; names the thing with backticks.
    path, line, column, width: the smallest span at fault; line and column count from 1.
    source: the text of that line, for the caret; empty where there is none.
    place: where, when it is not a position in a text file ("step 12", "object 3fa9...").
    help: one line that can be followed. notes: facts that help to understand.
    """

    code: str
    message: str
    path: str = ""
    line: int = 0
    column: int = 0
    width: int = 1
    source: str = ""
    place: str = ""
    help: str = ""
    notes: tuple[str, ...] = ()

    def render(self) -> str:
        lines = [f"error[{self.code}]: {self.message}"]
        gutter = len(str(self.line)) if self.line else 1
        pad = " " * gutter
        if self.path:
            position = f":{self.line}" if self.line else ""
            lines.append(f"{pad}--> {self.path}{position}")
        elif self.place:
            lines.append(f"{pad}--> {self.place}")
        if self.source:
            lines.append(f"{pad} |")
            lines.append(f"{self.line} | {self.source}")
            caret = " " * max(self.column - 1, 0) + "^" * max(self.width, 1)
            lines.append(f"{pad} | {caret}")
        if self.help:
            lines.append(f"{pad} = help: {self.help}")
        lines.extend(f"{pad} = note: {note}" for note in self.notes)
        # A damaged file is quoted here; no character of it may steer a terminal.
        return "\n".join("".join(c if c.isprintable() or c == "\n" else "?" for c in line) for line in lines)


class NmoeError(Exception):
    """A failure that has been understood. The command line prints it without a traceback."""

    exit_code = 1

    def __init__(self, diagnostics: Diagnostic | Iterable[Diagnostic]):
        if isinstance(diagnostics, Diagnostic):
            diagnostics = (diagnostics,)
        self.diagnostics = tuple(diagnostics)
        super().__init__(self.render())

    def render(self) -> str:
        return "\n\n".join(d.render() for d in self.diagnostics)


class ConfigError(NmoeError):
    """The user's input is not valid; nothing has been started."""

    exit_code = 2


class RunError(NmoeError):
    """Something that was started cannot go on."""


def fail(code: str, message: str, *, place: str = "", help: str = "", notes: Iterable[str] = ()) -> RunError:
    """A RunError of one finding; `raise fail(...)` reads well at the place of the failure."""
    return RunError(Diagnostic(code=code, message=message, place=place, help=help, notes=tuple(notes)))
