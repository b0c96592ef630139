"""Texts of configs, right and wrong: literals for every key, trees of every kind, lines that somebody has changed."""

import random
import zlib
from functools import cache
from math import nextafter
from typing import Any

import attrs
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.torture.campaign import ROOT
from tests.torture.fuzz_keys import SECTIONS, Key

BASES = ("tests/plan/base.toml", "tests/plan/mixture.toml", "tests/torture/small.toml")
LITERALS = (
    "0", "-1", "1", "+1", "2", "3", "-0", "0.0", "-0.0", "1.0", "0.5", "1e-5", "1e308", "-1e308", "1e309", "5e-324",
    "nan", "-nan", "inf", "-inf", "9007199254740991", "9007199254740992", "-9007199254740992", "9223372036854775808",
    "1" + "0" * 250, "1" + "0" * 300, "0x1F", "0o17", "0b11", "1_000", "1__0", "01", "1.", ".5", "1e", "0xG",
    "true", "false", "True", "null", "None", "yes", '""', "''", '" "', '"a"', '"1"', '"true"', '"cpu"', '"sm_90a"',
    '"fp32"', '"bf16"', '"mla"', '"gqa"', '"\\u0000"', '"\\u001b[31m"', '"\\ud800"', '"\\U0010FFFF"',
    '"\\u202e"', '"é"', '"\\x41"',
    '"\\e"', '"../../x"', '"~/x"', '"."', '"/"', "'a\tb'", '"""a\nb"""', "'''a\nb'''", '"' + "a" * 5000 + '"',
    '"' + "/a" * 3000 + '"',
    "1979-05-27", "07:32:00", "1979-05-27T07:32:00Z", "[]", "[1]", "[[]]", "[1, 'a']", "[1, 2, 3]", "[0.1, 0.2, 0.3]",
    "[nan]", "[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]", "{}", "{ a = 1 }", '{ kind = "mla" }', "{ kind = 1 }",
    "{a={a={a={a=1}}}}",
    "[{}]", "[{ weights = [1, 1] }]", "1 # x", "1 1", "", "[1,", "{ a = 1", "{ a = 1,\n b = 2 }", "[1\n,2\n]", "a", "=",
)  # fmt: skip
"""What stands behind an equals sign, right and wrong."""

WORDS = (b"\xff", b"\xc3\x28", b"\xed\xa0\x80", *(word.encode() for word in (
    "[", "]", "[[", "]]", "{", "}", "=", ".", ",", "\n", "\r\n", "\r", "\t", "\0", "\x7f", "\x1b", '"', "'", '"""',
    "'''", "#", "\\", "\ufeff", "\u2028", "é", "\U0001f600", "kind = ", "extends = ", "[model]", "[[data.stages]]",
    "inf",
    "nan", "-", "1e999", "0x", "_", "true", "\\u0000", "a." * 20, "[" * 20, "{a=" * 20, "9" * 300,
)))  # fmt: skip
"""What means something in TOML, or nothing anywhere."""

TRY = settings(
    derandomize=False, database=None, deadline=None, phases=(Phase.generate,), report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@cache
def texts() -> tuple[str, ...]:
    """Every config of the repository, and the bases of the tests."""
    paths = [*(ROOT / one for one in BASES), *sorted((ROOT / "configs").rglob("*.toml"))]
    return tuple(path.read_text(encoding="utf-8") for path in paths)


def literals(name: str, count: int) -> list[str]:
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

    @seed(zlib.crc32(name.encode()))
    @settings(TRY, max_examples=max(count, 1))
    @given(st.one_of(scalars, scalars, arrays, tables))
    def draw(literal: str) -> None:
        drawn.append(literal)

    draw()
    return drawn


def _string(text: str) -> str:
    """A basic string: quotes, backslashes and controls escaped as TOML wants, the rest as it is."""
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text) + '"'


def edges(key: Key) -> list[str]:
    """A key's own bounds, and what lies beside them; its choices."""
    step = 1 if key.type == "int" else 1e-9
    edges = [value for _, limit in key.limits for value in (limit - step, limit, limit + step)]
    found = [repr(int(value)) if key.type == "int" else repr(value) for value in edges]
    found += [f'"{choice}"' for choice in key.choices] + (["true", "false"] if key.type == "bool" else [])
    return [f"[{value}, {value}, {value}]" for value in found] if key.count is not None else found


def inside(draws: random.Random, key: Key) -> list[str]:
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
        lowest, highest = (
            (low if ">=" in signs else nextafter(low, high)),
            (high if "<=" in signs else nextafter(high, low)),
        )
        found = [
            repr(value)
            for value in (lowest, highest, low + (high - low) * draws.random(), min(low + draws.random(), highest))
        ]
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


def with_kind(tree: dict[str, Any], section: str, kind: str) -> dict[str, Any] | None:
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
        below = {
            one.name: _some(one, f"{path}.{one.name}")
            for one in kinds[kind].values()
            if one.required and one.type != "kind"
        }
        return {"kind": kind, **below} if kind else below
    if key.type == "sections":
        return [{"weights": [1]}]
    least = next((limit for sign, limit in key.limits if sign.startswith(">")), 0)
    value: Any = {
        "int": int(least) + 1,
        "float": least + 0.001,
        "bool": True,
        "str": key.choices[0] if key.choices else "a",
    }[key.type]
    return value if key.count is None else [value] * max(key.count, 1)


def bent_lines(draws: random.Random, text: str) -> bytes:
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
            rows[at] = draws.choice(
                (f"[{rows[at]}]", rows[at].replace("]", ".x]"), rows[at].replace("[", '["'), f"[{key}")
            )
        elif what == 7:
            section = draws.choice([name for name in SECTIONS if name])
            rows.insert(other, draws.choice((f"[{section}]", f"[[{section}]]", f"{section} = 1", f"{section} = {{}}")))
        elif what == 8:
            kinds = draws.choice([kinds for name, kinds in SECTIONS.items() if name])
            name = draws.choice(list(draws.choice(list(kinds.values()))))
            rows.insert(other, f"{name} = {draws.choice(LITERALS)}")
        elif what == 9 and equals:
            rows[at] = draws.choice(
                (f'"{key.strip()}"={value}', f"a.{rows[at]}", f"{key.strip()}.a={value}", f"{key} =={value}")
            )
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
