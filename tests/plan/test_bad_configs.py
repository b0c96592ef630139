"""Every config of bad.txt is refused: exit status 2, the expected code at the expected line, no traceback."""

import re
from pathlib import Path

import pytest

from nmoe.cli.main import run

HERE = Path(__file__).parent


def cases():
    for number, line in enumerate((HERE / "bad.txt").read_text().splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            base, code, rest = re.fullmatch(r"(\w+) (N\d{4})  (.*)", line).groups()
            edits, _, place = rest.partition("  @")
            yield pytest.param(base, code, edits.split(" & "), place, id=f"{number}-{code}-{rest[:50]}")


class Lines:
    """A TOML file as lines, edited by section and key. The files it is for have one statement a line."""

    def __init__(self, name: str):
        self.lines = (HERE / f"{name}.toml").read_text().splitlines()

    def where(self, place: str) -> int:
        """The index of the line of a section's header or of a key."""
        section, arrays = "", {}
        for index, line in enumerate(self.lines):
            if line.startswith("[["):
                name = line.strip("[]")
                arrays[name] = arrays.get(name, -1) + 1
                section = f"{name}.{arrays[name]}"
            elif line.startswith("["):
                section = line.strip("[]")
            if place == section or place == f"{section}.{line.partition('=')[0].strip()}":
                return index
        raise LookupError(place)

    def apply(self, edit: str) -> int | None:
        """Make one edit and give the index of its line."""
        if edit.startswith("-"):
            start = stop = self.where(edit[1:])
            while stop < len(self.lines) and self.lines[stop]:
                stop += 1
            # Blank lines keep the sections after it where they are, so that array indexes alone move.
            self.lines[start:stop] = [""] * (stop - start)
            return None
        change = re.fullmatch(r"([a-z_.0-9]+)([+-])(.*)", edit)
        if change and "=" not in change[1]:
            section, sign, rest = change.groups()
            if sign == "-":
                self.lines[self.where(f"{section}.{rest}")] = ""
                return None
            self.lines.insert(self.where(section) + 1, rest)
            return self.where(section) + 1
        path, value = re.fullmatch(r"([a-z_.0-9]+) = ?(.*)", edit).groups()
        index = self.where(path)
        self.lines[index] = f"{path.rpartition('.')[2]} = {value}"
        return index


@pytest.mark.parametrize(("base", "code", "edits", "place"), list(cases()))
def test_refused(base, code, edits, place, tmp_path, monkeypatch, capsys):
    config = Lines(base)
    places = [config.apply(edit) for edit in edits]
    if place == "file":
        expected = None
    elif "+" in place:  # the line after a header
        section, _, offset = place.partition("+")
        expected = config.where(section) + int(offset)
    else:
        expected = config.where(place) if place else places[0]
    if code == "N0106" and "+" not in place:
        expected += 1 + [line.partition("=")[0] for line in config.lines[expected + 1 :]].index(
            config.lines[expected].partition("=")[0]
        )  # the second of the two
    monkeypatch.chdir(tmp_path)
    Path("bad.toml").write_text("\n".join(config.lines) + "\n")

    status = run(["build", "bad.toml"])

    said = capsys.readouterr()
    assert status == 2
    assert said.out == ""
    assert "Traceback" not in said.err
    found = re.findall(r"^error\[(N\d{4})\]: .*\n *--> bad\.toml(?::(\d+))?$", said.err, re.MULTILINE)
    wanted = (code, "" if expected is None else str(expected + 1))
    assert wanted in found, said.err
    for block in said.err.split("\n\n"):
        assert block.startswith("error[N")
        if re.search(r"bad\.toml:\d+", block):
            assert re.search(r"^ *\| *\^+$", block, re.MULTILINE), block


def test_there_are_two_hundred():
    assert len(list(cases())) >= 200


def test_the_bases_are_valid():
    assert run(["build", str(HERE / "base.toml"), "--json"]) == 0
    assert run(["build", str(HERE / "mixture.toml"), "--json"]) == 0
