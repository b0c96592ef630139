"""One text: what is refused before parsing, and where each key and value stands."""

import pytest
import tomli
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.errors import ConfigError
from nmoe.plan.positions import Scanner
from nmoe.plan.resolve import resolve, resolve_text
from nmoe.plan.source import MAX_BYTES, parse


def refused(text):
    with pytest.raises(ConfigError) as caught:
        resolve_text(text, "x.toml")
    assert all(d.path == "x.toml" for d in caught.value.diagnostics)
    return caught.value.diagnostics


@pytest.mark.parametrize(
    ("text", "code", "line"),
    [
        (b"\xef\xbb\xbf[model]\n", "N0103", 1),
        ("[model]\n".encode("utf-16"), "N0103", 1),
        ("[model]\n".encode("utf-16-be"), "N0103", 1),
        (b"# fine\n# \xff\n", "N0103", 2),
        (b"# fine\nx = '\xc3'\n", "N0103", 2),
        (b"a = 1\n\nb = \0\n", "N0103", 3),
        (b"a = 1\r\nb = \"\x01\"\r\n", "N0105", 2),
        (b"a = 1\rb = 2\n", "N0105", 1),
        (b"#" * (MAX_BYTES + 1), "N0102", 0),
        (b"a = " + b"[" * 100_000, "N0104", 1),
        (b"\na = " + b"[" * 20 + b"]" * 20, "N0104", 2),
        (b"a = " + b"{a=" * 100_000, "N0104", 1),
        (b"# x\n" + b"a." * 50_000 + b"a = 1", "N0104", 2),
        (b"[" + b"a ." * 50_000 + b"a]", "N0104", 1),
        (b'"a".' * 50_000 + b"a = 1", "N0104", 1),
        (b"x = " + b"9" * 100_000, "N0104", 1),
        (b"x = 0x" + b"f" * 100_000, "N0104", 1),
        (b"a" * 100_000 + b" = 1", "N0104", 1),
        (b'x = """\nabc\n', "N0105", 2),
        (b"x = [\n1,\n2\n", "N0105", 3),
        (b"[a]\nx = 1\n[a]\n", "N0106", 3),
        (b"a.b = 1\n[a]\nc = 2\n", "N0106", 2),
        (b"a = {b = 1}\na.c = 2\n", "N0106", 2),
        (b"x = [\n 1,\n 2]\nx = [\n 1,\n 2]\n", "N0106", 4),
        (b"a = {b = 1, b = 2}\n", "N0106", 1),
        (b"[[a]]\n[a]\n", "N0106", 2),
    ],
)  # fmt: skip
def test_refused_with_its_line(text, code, line):
    [finding] = refused(text)
    assert (finding.code, finding.line) == (code, line)
    assert finding.source or code == "N0102"


def test_a_mebibyte_of_findings_is_bounded():
    """More unknown keys than anyone reads: the first ones, and how many there are."""
    findings = refused("".join(f"key{n} = {n}\n" for n in range(20_000)))
    assert len(findings) <= 201
    assert findings[-1].code == "N0100"


def test_a_long_line_is_cut_around_the_caret():
    [finding] = refused("x = '" + "a" * 500 + "' y")
    assert len(finding.source) <= 120
    assert finding.source[finding.column - 1] == "y"


def test_terminal_escapes_do_not_reach_the_terminal():
    findings = refused('"\\u001b[31mred" = 1\n"\\u202eabc" = 2\n')
    assert all(c.isprintable() or c == "\n" for d in findings for c in d.render())


@pytest.mark.parametrize("kind", ["missing", "directory", "nul"])
def test_files_that_cannot_be_read(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.toml").write_text("")
    name = {"missing": "confg.toml", "directory": ".", "nul": "a\0b"}[kind]
    with pytest.raises(ConfigError) as caught:
        resolve(name)
    [finding] = caught.value.diagnostics
    assert finding.code == "N0101"
    assert ("did you mean `config.toml`" in finding.help) == (kind == "missing")


@pytest.mark.parametrize("name", ["a" * 300 + ".toml", "a/" * 3000 + "b.toml"])
def test_a_name_that_no_file_can_have(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"N0101.*name too long"):
        resolve(name)
    (tmp_path / "child.toml").write_text(f'extends = "{name}"\n')
    with pytest.raises(ConfigError, match=r"N0108.*name too long"):
        resolve("child.toml")


@pytest.mark.parametrize("word", ["model.num_layers=a\x1b[31m", "model.\ufeffdtype=fp32", "x=a" + "b" * 5000])
def test_no_help_repeats_a_set_that_a_shell_could_not_have_meant(word):
    with pytest.raises(ConfigError) as caught:
        resolve_text("", "x.toml", [word])
    said = caught.value.render()
    assert all(c.isprintable() or c == "\n" for c in said)
    assert len(said) < 2000


def test_positions_by_hand():
    text = (
        "top = 1\n"
        "[ a . b ]  # header\n"
        "  key   =   [ 1,\n"
        "    'two', # x\n"
        "  ]\n"
        '"quoted key" = { p = 1, q.r = """multi\nline""" }\n'
        "c.d = 0x1F\n"
        "[[list]]\n"
        "v = 1\n"
        "[[list]]\n"
        "[list.sub]\n"
        "w = 1979-05-27 07:32:00\n"
    )
    marks = Scanner(text).marks
    found = {
        ".".join(map(str, path)): (mark.key.line, mark.key.column, mark.key.width, mark.value.line, mark.value.column)
        for path, mark in marks.items()
    }
    assert found == {
        "top": (1, 1, 3, 1, 7),
        "a": (2, 1, 9, 2, 1),
        "a.b": (2, 1, 9, 2, 1),
        "a.b.key": (3, 3, 3, 3, 13),
        "a.b.key.0": (3, 15, 1, 3, 15),
        "a.b.key.1": (4, 5, 5, 4, 5),
        "a.b.quoted key": (6, 1, 12, 6, 16),
        "a.b.quoted key.p": (6, 18, 1, 6, 22),
        "a.b.quoted key.q": (6, 25, 1, 6, 25),
        "a.b.quoted key.q.r": (6, 27, 1, 6, 31),
        "a.b.c": (8, 1, 1, 8, 1),
        "a.b.c.d": (8, 3, 1, 8, 7),
        "list": (9, 1, 8, 9, 1),
        "list.0": (9, 1, 8, 9, 1),
        "list.0.v": (10, 1, 1, 10, 5),
        "list.1": (11, 1, 8, 11, 1),
        "list.1.sub": (12, 1, 10, 12, 1),
        "list.1.sub.w": (13, 1, 1, 13, 5),
    }


def paths_of(value, path=()):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield (*path, name)
        yield from paths_of(item, (*path, name))


SCALARS = st.one_of(
    st.integers(-99, 99).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr).map(lambda t: t if "." in t or "e" in t else t + ".0"),
    st.sampled_from(["true", "07:32:00", "1979-05-27 07:32:00.5", '"a # b"', "'[x]'", '"\\"="', '"""\na\n"]"""',
                     "'''\n'' }'''", '""', "''", '"""a"""""', "0xff", "1_000"]),
)  # fmt: skip
KEYS = st.sampled_from(["a", "b", "c-d", "1", '"x y"', "'='", '"]"', '"#"', "e.f", 'g."h.i"'])
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda v: "[ " + ", ".join(v) + " ]")
        | st.lists(inner, min_size=1, max_size=3).map(lambda v: "[\n # c ]\n" + ",\n".join(v) + ",\n]")
        | st.lists(st.tuples(KEYS, inner), max_size=3).map(
            lambda v: "{ " + ", ".join(f"{k} = {x}" for k, x in v) + " }"
        )
    ),
    max_leaves=5,
)
LINES = st.one_of(
    st.tuples(KEYS, VALUES).map(lambda p: f"{p[0]} = {p[1]}  # c [ = \" '"),
    KEYS.map(lambda k: f"[t.{k}]"),
    st.sampled_from(["[[u]]", "[[u.v]]", "# [x]", "", "  "]),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(LINES, max_size=8).map("\n".join))
def test_every_path_of_a_valid_text_has_a_mark_that_reads_back(text):
    """Where the parser accepts, the scanner finds the same paths, and each value's text parses to the value."""
    try:
        data = tomli.loads(text)
    except tomli.TOMLDecodeError:
        return
    scanner = Scanner(text)
    assert scanner.complete
    assert set(scanner.marks) == set(paths_of(data))
    lines = text.split("\n")
    for path, mark in scanner.marks.items():
        value = data
        for part in path:
            value = value[part]
        line = lines[mark.value.line - 1]
        piece = line[mark.value.column - 1 : mark.value.column - 1 + mark.value.width]
        if isinstance(value, (int, float, bool)):
            assert tomli.loads(f"x = {piece}")["x"] == value
        assert mark.key.column + mark.key.width - 1 <= len(lines[mark.key.line - 1])


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ab.=[]{}\"'#\n\\, 1-_:", max_size=60) | st.binary(max_size=60))
def test_no_text_makes_a_traceback(text):
    with pytest.raises(ConfigError):  # nothing so short is a whole config
        resolve_text(text, "x.toml")


def test_windows_line_ends_are_line_ends():
    source = parse("a = 1\r\nb = 2\r\n", "x", "x")
    assert source.marks[("b",)].key.line == 2
