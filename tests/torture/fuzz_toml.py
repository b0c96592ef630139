"""Configs from hostile hands, through the real resolve: values of every key, lines, bytes, parents, `--set` words.

What is accepted has to be a document that the judge of `fuzz_keys` accepts, with every value that was written in it; its
plan has to print, and what is printed has to resolve to the same fingerprint.
"""

import contextlib
import io
import random
import tomllib
from collections.abc import Callable, Iterator
from functools import cache, partial
from math import nextafter
from pathlib import Path
from typing import Any

import attrs
import tomli
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from nmoe.cli.main import run
from nmoe.plan.plan import Plan
from nmoe.plan.render import render
from nmoe.plan.resolve import resolve, resolve_text
from tests.torture import mutate
from tests.torture.campaign import ROOT, Tally
from tests.torture.fuzz_case import Count
from tests.torture.fuzz_keys import SECTIONS, Key, contradictions, faults, kept

BASES = ("tests/plan/base.toml", "tests/plan/mixture.toml", "tests/torture/small.toml")
LITERALS = (
    "0", "-1", "1", "+1", "2", "3", "-0", "0.0", "-0.0", "1.0", "0.5", "1e-5", "1e308", "-1e308", "1e309", "5e-324",
    "nan", "-nan", "inf", "-inf", "9007199254740991", "9007199254740992", "-9007199254740992", "9223372036854775808",
    "1" + "0" * 250, "1" + "0" * 300, "0x1F", "0o17", "0b11", "1_000", "1__0", "01", "1.", ".5", "1e", "0xG", "true", "false",
    "True", "null", "None", "yes", '""', "''", '" "', '"a"', '"1"', '"true"', '"cpu"', '"sm_90a"', '"fp32"', '"bf16"',
    '"mla"', '"gqa"', '"\\u0000"', '"\\u001b[31m"', '"\\ud800"', '"\\U0010FFFF"', '"\\u202e"', '"é"', '"\\x41"', '"\\e"',
    '"../../x"', '"~/x"', '"."', '"/"', "'a\tb'", '"""a\nb"""', "'''a\nb'''", '"' + "a" * 5000 + '"', '"' + "/a" * 3000 + '"',
    "1979-05-27", "07:32:00", "1979-05-27T07:32:00Z", "[]", "[1]", "[[]]", "[1, 'a']", "[1, 2, 3]", "[0.1, 0.2, 0.3]",
    "[nan]", "[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]", "{}", "{ a = 1 }", '{ kind = "mla" }', "{ kind = 1 }", "{a={a={a={a=1}}}}",
    "[{}]", "[{ weights = [1, 1] }]", "1 # x", "1 1", "", "[1,", "{ a = 1", "{ a = 1,\n b = 2 }", "[1\n,2\n]", "a", "=",
)  # fmt: skip
"""What stands behind an equals sign, right and wrong."""

WORDS = tuple(word.encode() for word in (
    "[", "]", "[[", "]]", "{", "}", "=", ".", ",", "\n", "\r\n", "\r", "\t", "\0", "\x7f", "\x1b", '"', "'", '"""', "'''", "#",
    "\\", "\ufeff", "\u2028", "é", "\U0001f600", "kind = ", "extends = ", "[model]", "[[data.stages]]", "inf", "nan", "-",
    "1e999", "0x", "_", "true", "\\u0000", "a." * 20, "[" * 20, "{a=" * 20, "9" * 300,
)) + (b"\xff", b"\xc3\x28", b"\xed\xa0\x80")  # fmt: skip

TRY = settings(
    derandomize=False, database=None, deadline=None, phases=(Phase.generate,), report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@cache
def texts() -> tuple[str, ...]:
    """Every config of the repository, and the bases of the tests."""
    paths = [*(ROOT / one for one in BASES), *sorted((ROOT / "configs").rglob("*.toml"))]
    return tuple(path.read_text(encoding="utf-8") for path in paths)


def values(name: str, count: int, directory: Path) -> Tally:
    """Every key in turn, with literals of every type and what hypothesis draws, written in a config or with --set."""
    found, draws = Count(), random.Random(name)
    places = [(section, kind, key) for section, kinds in SECTIONS.items() if section
              for kind, spec in kinds.items() for key in spec.values()]  # fmt: skip
    drawn = _literals(name, count // 2)
    for number in range(count):
        section, kind, key = places[number % len(places)] if draws.random() < 0.8 else draws.choice(places)
        literal = draws.choice((*LITERALS, *_edges(key))) if number % 2 else drawn[number // 2 % len(drawn)]
        base = tomllib.loads(texts()[draws.randrange(len(BASES))])
        bent = _with_kind(base, section, kind)
        if draws.random() < 0.5:
            text = toml(base)
            word = f"{section}.{key.name}={literal}"
            _resolved(found, name, number, text, [word])
        else:
            if bent is not None:
                bent[key.name] = Raw(literal)
            _resolved(found, name, number, toml(base), [])
    return found.tally()


def within(name: str, count: int, directory: Path) -> Tally:
    """Several keys at once with values inside their bounds, at the edges and between, and sections of any kind."""
    found, draws = Count(), random.Random(name)
    sections = [section for section in SECTIONS if section]
    for number in range(count):
        base = tomllib.loads(texts()[draws.randrange(len(BASES))])
        for _ in range(draws.choice((1, 2, 3, 6))):
            section = draws.choice(sections)
            kind = draws.choice(list(SECTIONS[section]))
            keys = [key for key in SECTIONS[section][kind].values() if not key.type.startswith(("section", "kind"))]
            bent = _with_kind(base, section, kind)
            if keys:
                key = draws.choice(keys)
                bent[key.name] = Raw(draws.choice(_inside(draws, key)))
        _resolved(found, name, number, toml(base), [])
    return found.tally()


def lines(name: str, count: int, directory: Path) -> Tally:
    """Lines lost, doubled, moved, renamed, given other values, of another section; other ends of lines."""
    return _many(name, count, lambda draws: _bent_lines(draws, draws.choice(texts())))


def bytes_(name: str, count: int, directory: Path) -> Tally:
    """Bits, bytes and stretches of a config, and the halves of two."""

    def bent(draws: random.Random) -> bytes:
        content = draws.choice(texts()).encode()
        if draws.random() < 0.1:
            other = draws.choice(texts()).encode()
            content = content[: draws.randrange(len(content))] + other[draws.randrange(len(other)) :]
        return mutate.of_bytes(draws, content, WORDS)

    return _many(name, count, bent)


def sets(name: str, count: int, directory: Path) -> Tally:
    """Words of --set: keys known, misspelt, dotted and quoted, with values right and wrong."""
    found, draws = Count(), random.Random(name)
    known = [f"{section}.{key}" for section, kinds in SECTIONS.items() if section for spec in kinds.values()
             for key in spec]  # fmt: skip
    for number in range(count):
        words = []
        for _ in range(draws.choice((1, 1, 2, 3))):
            word = f"{draws.choice(known)}{draws.choice(('=', ' = '))}{draws.choice(LITERALS)}"
            if draws.random() < 0.5:
                word = mutate.of_bytes(draws, word.encode(), WORDS).decode("utf-8", draws.choice(("replace", "surrogateescape")))
            words.append(word)
        _resolved(found, name, number, texts()[number % len(BASES)], words)
    return found.tally()


def parents(name: str, count: int, directory: Path) -> Tally:
    """Files and what they extend, through the command line: `nmoe build`, its output and its status."""
    found, draws = Count(), random.Random(name)
    child, parent = directory / "child.toml", directory / "parent.toml"
    (directory / "folder.toml").mkdir()
    names = ('"parent.toml"', '"child.toml"', '"."', '""', '"folder.toml"', '"nowhere.toml"', '"' + "a" * 300 + '"',
             '"' + "a/" * 3000 + 'b"', '"/dev/null"', '"/proc/self/mem"', '"a\\u0000b"', '"~"', '"parent.toml/x"', "1", "[]",
             "{}", "['parent.toml']", '"./././parent.toml"', "'\ud800'")  # fmt: skip
    for number in range(count):
        text = draws.choice(texts())
        bent = draws.choice((lambda text: text.encode(), partial(_bent_lines, draws),
                             lambda text: mutate.of_bytes(draws, text.encode(), WORDS)))  # fmt: skip
        target = names[0] if draws.random() < 0.7 else draws.choice(names)
        parent.write_bytes(bent(text))
        some = draws.choice(('[random]\nseed = 3\n', '[model]\nnum_layers = 2\n', "", "[output]\nprefetch = 4\n", text))
        rest = some.encode() if draws.random() < 0.5 else _bent_lines(draws, some)
        child.write_bytes(f"extends = {target}\n".encode("utf-8", "surrogatepass") + rest)
        _printed(found, f"{name} {number}", child)
    return found.tally()


def _many(name: str, count: int, bent: Callable[[random.Random], bytes]) -> Tally:
    found, draws = Count(), random.Random(name)
    for number in range(count):
        _resolved(found, name, number, bent(draws), [])
    return found.tally()


def _resolved(found: Count, name: str, number: int, text: str | bytes, words: list[str]) -> None:
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    found.case(f"{name} {number}", lambda: resolve_text(raw, "fuzz.toml", words), lambda plan: _wrong(plan, raw, words))


def _wrong(plan: Plan, raw: bytes, words: list[str]) -> Iterator[str]:
    """What is wrong with a plan that was accepted."""
    yield from faults(plan.tree)
    yield from contradictions(plan.tree)
    written = tomli.loads(raw.decode("utf-8"))
    if words:
        written = tomli.loads(words[-1])
    elif "extends" not in written:
        yield from faults(written)
    if "extends" not in written:
        yield from kept(written, plan.tree)
    printed = plan.to_toml()
    yield from (f"printed: {fault}" for fault in (*faults(tomllib.loads(printed)), *kept(plan.tree, tomllib.loads(printed))))
    again = resolve_text(printed, "again.toml")
    if (again.fingerprint, again.tree_digest) != (plan.fingerprint, plan.tree_digest):
        yield "the printed plan resolves to another fingerprint"
    if not render(plan).isascii():
        yield "the plan for people is not ASCII"
    plan.to_json()


def _printed(found: Count, what: str, path: Path) -> None:
    """`nmoe build PATH --print`: what it prints, and how it ends."""

    def call() -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = run(["build", str(path), "--print"])
        if status == 2 and err.getvalue().startswith("error[") and not out.getvalue():
            resolve(path)  # refuses it once more, in the same words
        return status, out.getvalue(), err.getvalue()

    def judge(answer: tuple[int, str, str]) -> Iterator[str]:
        status, out, err = answer
        plan = resolve(path)
        if (status, out, err) != (0, render(plan), ""):
            yield f"status {status}, {len(out)} characters, {err[:200]!r}"
        yield from (*faults(plan.tree), *contradictions(plan.tree))

    found.case(what, call, judge)


def _literals(name: str, count: int) -> list[str]:
    """Literals of TOML that hypothesis draws, about as many."""
    scalars = st.one_of(
        st.integers().map(str),
        st.integers(-(2**53), 2**53).map(str),
        st.floats().map(repr),
        st.floats(0, 2).map(repr),
        st.booleans().map(lambda value: str(value).lower()),
        st.text(max_size=20).map(_string),
        st.text(alphabet=st.characters(codec="utf-8"), max_size=8),
    )
    arrays = st.lists(scalars, max_size=4).map(lambda items: f"[{', '.join(items)}]")
    tables = st.dictionaries(st.text(max_size=6).map(_string), scalars, max_size=3).map(
        lambda items: "{" + ", ".join(f"{key} = {value}" for key, value in items.items()) + "}"
    )
    drawn: list[str] = []

    @seed(int.from_bytes(name.encode()[:8]))
    @settings(TRY, max_examples=max(count, 1))
    @given(st.one_of(scalars, scalars, arrays, tables))
    def draw(literal: str) -> None:
        drawn.append(literal)

    draw()
    return drawn


def _string(text: str) -> str:
    """A basic string: quotes, backslashes and controls escaped as TOML wants, the rest as it is."""
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text) + '"'


def _edges(key: Key) -> list[str]:
    """A key's own bounds, and what lies beside them; its choices."""
    step = 1 if key.type == "int" else 1e-9
    edges = [value for _, limit in key.limits for value in (limit - step, limit, limit + step)]
    found = [repr(int(value)) if key.type == "int" else repr(value) for value in edges]
    found += [f'"{choice}"' for choice in key.choices] + (["true", "false"] if key.type == "bool" else [])
    return [f"[{value}, {value}, {value}]" for value in found] if key.count is not None else found


def _inside(draws: random.Random, key: Key) -> list[str]:
    """Literals that a key may have."""
    signs = dict(key.limits)
    least, most = (next((signs[sign] for sign in pair if sign in signs), None) for pair in ((">=", ">"), ("<=", "<")))
    if key.type == "int":
        low, high = int(least or 0), int(most if most is not None else 2**53 - 1)
        some = [low, low + 1, high, high - 1, draws.randint(low, high), draws.randint(low, min(high, low + 300))]
        some += [min(max(2 ** draws.randrange(53), low), high), min(max(64 * draws.randrange(1, 65), low), high)]
        found = [str(value) for value in some]
    elif key.type == "float":
        low, high = (-1e300 if least is None else least), (1e300 if most is None else most)
        lowest, highest = (low if ">=" in signs else nextafter(low, high)), (high if "<=" in signs else nextafter(high, low))
        found = [repr(value) for value in (lowest, highest, low + (high - low) * draws.random(), min(low + draws.random(), highest))]
    else:
        found = [f'"{one}"' for one in key.choices or ("a", "runs/x", "data/a", "data/b", "~", "é", "😀", ".x", "a/..")]
        found = ["true", "false"] if key.type == "bool" else found
    if key.count is not None:
        length = key.count if key.count > 0 else draws.randrange(4)
        return [f"[{', '.join(draws.choice(found) for _ in range(length))}]"]
    return found


@attrs.frozen
class Raw:
    """A literal as it stands in the text."""

    text: str


def toml(tree: dict[str, Any], path: str = "") -> str:
    """A tree as text; a Raw's as it is."""
    plain = [f"{name} = {_literal(value)}\n" for name, value in tree.items() if not _is_tables(value)]
    for name, value in tree.items():
        here = f"{path}.{name}".lstrip(".")
        if isinstance(value, dict):
            plain.append(f"\n[{here}]\n{toml(value, here)}")
        elif _is_tables(value):
            plain += [f"\n[[{here}]]\n{toml(item, here)}" for item in value]
    return "".join(plain)


def _is_tables(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _literal(value: Any) -> str:
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    return _string(value) if isinstance(value, str) else str(value).lower()


def _with_kind(tree: dict[str, Any], section: str, kind: str) -> dict[str, Any] | None:
    """The table of a section, of that kind, with something in each key that it needs; made where there is none."""
    here, path = tree, ""
    for name in section.split("."):
        path = f"{path}.{name}".lstrip(".")
        if isinstance(here.get(name), list):
            here = here[name][-1]
            continue
        kinds = SECTIONS[path]
        wanted = kind if path == section else here.get(name, {}).get("kind", next(iter(kinds)))
        if name not in here or here[name].get("kind", "") != wanted:
            here[name] = {"kind": wanted} if wanted else {k: v for k, v in here.get(name, {}).items() if k in kinds[""]}
            for key in kinds[wanted].values():
                if key.required and key.name != "kind":
                    here[name].setdefault(key.name, _some(key, f"{path}.{key.name}"))
        here = here[name]
    return here


def _some(key: Key, path: str) -> Any:
    """A value that a key may have."""
    if key.type == "section":
        kinds = SECTIONS[path]
        kind = next(iter(kinds))
        below = {one.name: _some(one, f"{path}.{one.name}") for one in kinds[kind].values() if one.required and one.type != "kind"}
        return {"kind": kind, **below} if kind else below
    if key.type == "sections":
        return [{"weights": [1]}]
    least = next((limit for sign, limit in key.limits if sign.startswith(">")), 0)
    value: Any = {"int": int(least) + 1, "float": least + 0.001, "bool": True, "str": key.choices[0] if key.choices else "a"}[key.type]
    return value if key.count is None else [value] * max(key.count, 1)


def _bent_lines(draws: random.Random, text: str) -> bytes:
    """One to three changes of lines."""
    rows = text.split("\n")
    for _ in range(draws.choice((1, 1, 1, 2, 3))):
        rows = rows or [""]
        at, other = draws.randrange(len(rows)), draws.randrange(len(rows) + 1)
        key, equals, value = rows[at].partition("=")
        what = draws.randrange(12)
        if what == 0 and len(rows) > 1:
            del rows[at]
        elif what == 1:
            rows.insert(other, rows[at])
        elif what == 2 and len(rows) > 1:
            rows.insert(draws.randrange(len(rows)), rows.pop(at))
        elif what == 3 and equals:
            rows[at] = key.rstrip()[:-1] + draws.choice("asx_ ") + " =" + value
        elif what == 4 and equals:
            rows[at] = f"{key}= {draws.choice(LITERALS)}"
        elif what == 5 and equals:
            _, also, another = draws.choice(rows).partition("=")
            rows[at] = f"{key}={another}" if also else rows[at]
        elif what == 6 and rows[at].startswith("["):
            rows[at] = draws.choice((f"[{rows[at]}]", rows[at].replace("]", ".x]"), rows[at].replace("[", '["'), f"[{key}"))
        elif what == 7:
            section = draws.choice([name for name in SECTIONS if name])
            rows.insert(other, draws.choice((f"[{section}]", f"[[{section}]]", f"{section} = 1", f"{section} = {{}}")))
        elif what == 8:
            kinds = draws.choice([kinds for name, kinds in SECTIONS.items() if name])
            name = draws.choice(list(draws.choice(list(kinds.values()))))
            rows.insert(other, f"{name} = {draws.choice(LITERALS)}")
        elif what == 9 and equals:
            rows[at] = draws.choice((f'"{key.strip()}"={value}', f"a.{rows[at]}", f"{key.strip()}.a={value}", f"{key} =={value}"))
        elif what == 10 and rows[at].startswith("["):
            end = next((i for i in range(at + 1, len(rows)) if rows[i].startswith("[")), len(rows))
            block = rows[at:end]
            if draws.random() < 0.5:
                del rows[at:end]
            rows[len(rows) :] = block if draws.random() < 0.5 else []
        else:
            rows[at] += draws.choice(("# é", "\t", " \\", "\u00a0", "\x0c", '"', "]"))
    joined = draws.choice(("\n", "\n", "\n", "\r\n", "\n\n", "\r")).join(rows).encode("utf-8", "surrogatepass")
    return draws.choice((b"", b"", b"", b"", b"", b"\xef\xbb\xbf", b"\0", b"\n")) + joined


KINDS = {"values": values, "within": within, "lines": lines, "bytes": bytes_, "sets": sets, "parents": parents}
