"""What becomes of a file whose bytes, lines or values somebody has changed; everything drawn from one seeded source."""

import copy
import json
import random
from collections.abc import Sequence
from typing import Any

HUGE = (2**31, 2**31 - 1, 2**53 - 1, 2**53, 2**60, 2**63 - 1, 2**63, 2**64, 10**30, 10**400)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, -(2**31), -(2**63), *HUGE, 0.0, -0.0, 1.5, 1e300, float("nan"), float("inf"),
    "", " ", "0", "1", "null", "\x00", "\ud800", "\u202e", "\u0661", "../../etc/passwd", "a" * 300, "é" * 40, "0" * 64,
    "f" * 64, "F" * 64, "g" * 64, "f" * 63, [], [[]], [None], {}, {"": None}, {"x": {}},
)  # fmt: skip
"""What may stand in the place of a value: of every type, at every edge."""

DEEP = tuple("[" * depth + "]" * depth for depth in (500, 900, 10_000))


def deep(depth: int) -> Any:
    """Lists in lists."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def of_bytes(draws: random.Random, content: bytes, words: Sequence[bytes] = ()) -> bytes:
    """One to four changes: bits, single bytes, stretches lost, doubled, moved or filled, the end cut off, a word."""
    data = bytearray(content)
    for _ in range(draws.choice((1, 1, 1, 2, 4))):
        at = draws.randrange(len(data) + 1)
        until = min(len(data), at + draws.choice((1, 1, 2, 8, 64, 512)))
        what = draws.randrange(10 if words else 9)
        if what == 0 and at < len(data):
            data[at] ^= 1 << draws.randrange(8)
        elif what == 1 and at < len(data):
            data[at] = draws.randrange(256)
        elif what == 2:
            del data[at:until]
        elif what == 3:
            data[at:at] = data[at:until]
        elif what == 4:
            data[at:at] = draws.randbytes(draws.choice((1, 4, 64)))
        elif what == 5:
            del data[at:]
        elif what == 6:
            data[at:until] = bytes([draws.choice((0, 32, 255))]) * (until - at)
        elif what == 7:
            other = draws.randrange(len(data) + 1)
            piece = data[at:until]
            del data[at:until]
            data[other:other] = piece
        elif what == 8:
            data[at:at] = draws.choice(
                (b"\0", b"\r", b"\n", b"\xef\xbb\xbf", b"\xff\xfe", b'"', b"{", b"[", b"}", b"-")
            )
        elif words:
            data[at : draws.choice((at, until))] = draws.choice(words)
    return bytes(data)


def of_value(draws: random.Random, value: Any) -> Any:
    """A JSON value with one to three changes: a key lost, new, renamed or of another place, a value of another type."""
    changed = copy.deepcopy(value)
    for _ in range(draws.choice((1, 1, 1, 2, 3))):
        if not isinstance(changed, dict | list):
            return draws.choice(VALUES)
        place = draws.choice(_places(changed))
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draws.choice(keys) if keys else None
        what = draws.randrange(8)
        if what == 0 and key is not None:
            del place[key]
        elif what == 1:
            _add(place, draws.choice(("x", "", "kind", "\ud800", "__class__", "a" * 5000)), draws.choice(VALUES))
        elif what == 2 and isinstance(place, dict) and key is not None:
            place[str(key)[:-1] + draws.choice("sx_ ")] = place.pop(key)
        elif what == 3 and key is not None:
            other = draws.choice(_places(changed))
            _add(other, str(key), copy.deepcopy(place[key]))
        elif what == 4 and key is not None:
            place[key] = deep(draws.choice((3, 20, 100)))
        elif what == 5 and key is not None and isinstance(place[key], int):
            place[key] += draws.choice((-1, 1, 2**20, 2**60, -place[key] - 1))
        elif what == 6 and key is not None and isinstance(place, list):
            place.insert(draws.randrange(len(place) + 1), copy.deepcopy(place[key]))
        elif key is not None:
            place[key] = draws.choice(VALUES)
    return changed


def of_json(draws: random.Random, value: Any, *, indent: int | None = None) -> bytes:
    """The text of a changed value; or of the value itself as no writer writes it: keys twice, other digits, spaces."""
    what = draws.randrange(12)
    if what < 9:
        text = json.dumps(of_value(draws, value), indent=indent)
    else:
        text = json.dumps(value, indent=indent)
        if what == 9 and isinstance(value, dict) and value:
            key = draws.choice(list(value))
            text = "{" + f"{json.dumps(key)}: {json.dumps(draws.choice(VALUES))}, " + text.lstrip()[1:]
        elif what == 10:
            text = draws.choice((" ", "\n", "\t")) + text + draws.choice(("", " ", "\n{}"))
        else:
            digits = [i for i, c in enumerate(text) if c.isdigit()]
            at = draws.choice(digits) if digits else 0
            text = (
                text[:at]
                + draws.choice(("1e3", "-", "0x1", "9" * 5000, "1.0", "NaN", "Infinity", *DEEP))
                + text[at + 1 :]
            )
    try:
        return text.encode("utf-8", draws.choice(("surrogatepass", "strict")))
    except UnicodeEncodeError:
        return text.encode("ascii", "backslashreplace")


def _places(value: Any) -> list[Any]:
    """Every object and list of a value."""
    found, waiting = [], [value]
    while waiting:
        here = waiting.pop()
        found.append(here)
        inside = here.values() if isinstance(here, dict) else here
        waiting += [item for item in inside if isinstance(item, dict | list)]
    return found


def _add(place: Any, key: str, value: Any) -> None:
    if isinstance(place, dict):
        place[key] = value
    else:
        place.append(value)
