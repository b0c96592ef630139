"""Configs from hostile hands, through the real resolve: values of every key, lines, bytes, parents, `--set` words.

What is accepted has to be a document that the judge of `fuzz_keys` accepts, with every value that was written in it;
its plan has to print, and what is printed has to resolve to the same fingerprint.
"""

import contextlib
import io
import random
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import tomli

from nmoe.cli.main import run
from nmoe.plan.plan import Plan
from nmoe.plan.render import render
from nmoe.plan.resolve import resolve, resolve_text
from tests.torture import mutate
from tests.torture.campaign import Tally
from tests.torture.fuzz_case import Count
from tests.torture.fuzz_keys import SECTIONS, contradictions, faults, kept
from tests.torture.fuzz_text import (
    BASES,
    LITERALS,
    WORDS,
    Raw,
    bent_lines,
    edges,
    inside,
    literals,
    texts,
    toml,
    with_kind,
)  # fmt: skip


def values(name: str, count: int, directory: Path) -> Tally:
    """Every key in turn, with literals of every type and what hypothesis draws, written in a config or with --set."""
    found, draws = Count(), random.Random(name)
    places = [(section, kind, key) for section, kinds in SECTIONS.items() if section
              for kind, spec in kinds.items() for key in spec.values()]  # fmt: skip
    drawn = literals(name, count // 2)
    for number in range(count):
        section, kind, key = places[number % len(places)] if draws.random() < 0.8 else draws.choice(places)
        literal = draws.choice((*LITERALS, *edges(key))) if number % 2 else drawn[number // 2 % len(drawn)]
        base = tomllib.loads(texts()[draws.randrange(len(BASES))])
        bent = with_kind(base, section, kind)
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
            bent = with_kind(base, section, kind)
            if keys:
                key = draws.choice(keys)
                bent[key.name] = Raw(draws.choice(inside(draws, key)))
        _resolved(found, name, number, toml(base), [])
    return found.tally()


def lines(name: str, count: int, directory: Path) -> Tally:
    """Lines lost, doubled, moved, renamed, given other values, of another section; other ends of lines."""
    return _many(name, count, lambda draws: bent_lines(draws, draws.choice(texts())))


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
                word = mutate.of_bytes(draws, word.encode(), WORDS).decode(
                    "utf-8", draws.choice(("replace", "surrogateescape"))
                )
            words.append(word)
        _resolved(found, name, number, texts()[number % len(BASES)], words)
    return found.tally()


def parents(name: str, count: int, directory: Path) -> Tally:
    """Files and what they extend, through the command line: `nmoe build`, its output and its status."""
    found, draws = Count(), random.Random(name)
    child, parent = directory / "child.toml", directory / "parent.toml"
    (directory / "folder.toml").mkdir()
    names = ('"parent.toml"', '"child.toml"', '"."', '""', '"folder.toml"', '"nowhere.toml"', '"' + "a" * 300 + '"',
             '"' + "a/" * 3000 + 'b"', '"/dev/null"', '"/proc/self/mem"', '"a\\u0000b"', '"~"', '"x/y"', "1", "[]",
             "{}", "['parent.toml']", '"./././parent.toml"', "'\ud800'")  # fmt: skip
    for number in range(count):
        text = draws.choice(texts())
        bent = draws.choice((lambda text: text.encode(), partial(bent_lines, draws),
                             lambda text: mutate.of_bytes(draws, text.encode(), WORDS)))  # fmt: skip
        target = names[0] if draws.random() < 0.7 else draws.choice(names)
        parent.write_bytes(bent(text))
        some = draws.choice(("[random]\nseed = 3\n", "[model]\nnum_layers = 2\n", "", "[output]\nprefetch = 4\n", text))
        rest = some.encode() if draws.random() < 0.5 else bent_lines(draws, some)
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
    yield from (
        f"printed: {fault}" for fault in (*faults(tomllib.loads(printed)), *kept(plan.tree, tomllib.loads(printed)))
    )
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


KINDS = {"values": values, "within": within, "lines": lines, "bytes": bytes_, "sets": sets, "parents": parents}
