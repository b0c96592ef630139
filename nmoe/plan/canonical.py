"""Canonical JSON (RFC 8785, JCS): one text for one value, so that its hash names it.

Objects are sorted by their keys' UTF-16 code units, there is no space, strings have the shortest
escapes, and a number is what ECMAScript's Number::toString (ECMA-262, section 6.1.6.1.20) makes of
the double: the shortest digits that read back to it, laid out by the place of the decimal point.
Python's repr finds the same digits, and its layout differs, so only the layout is done here.

Integers are kept within 2^53 - 1, where every reader of JSON has them exactly; then 1 and 1.0 are
the same number and the same text. -0.0 is "0". nan and inf have no text and are refused.
"""

import json
import math
from typing import Any

MAX_INT = 2**53 - 1


def canonical(value: Any) -> bytes:
    """The canonical UTF-8 text of None, bool, int, float, str, and lists, tuples and dicts of them.

    Raises ValueError for nan, inf, integers beyond 2^53 - 1 and lone surrogates, TypeError for
    other types and for keys that are no strings.
    """
    parts: list[str] = []
    _write(value, parts.append)
    try:
        return "".join(parts).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("a lone surrogate has no UTF-8") from error


def _write(value: Any, put: Any) -> None:
    if value is None:
        put("null")
    elif isinstance(value, bool):
        put("true" if value else "false")
    elif isinstance(value, str):
        put(_string(value))
    elif isinstance(value, int):
        if abs(value) > MAX_INT:
            raise ValueError(f"the integer {value} is beyond 2^53 - 1")
        put(str(int(value)))
    elif isinstance(value, float):
        put(number(value))
    elif isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("the keys of a JSON object are strings")
        put("{")
        for index, key in enumerate(sorted(value, key=_utf16)):
            put("," if index else "")
            put(_string(key))
            put(":")
            _write(value[key], put)
        put("}")
    elif isinstance(value, (list, tuple)):
        put("[")
        for index, item in enumerate(value):
            put("," if index else "")
            _write(item, put)
        put("]")
    else:
        raise TypeError(f"{type(value).__name__} has no JSON")


def _utf16(key: str) -> bytes:
    """Big-endian UTF-16 compares as its code units do."""
    return key.encode("utf-16-be", errors="surrogatepass")


_string = json.JSONEncoder(ensure_ascii=False).encode
"""JSON string: \\b \\t \\n \\f \\r, quote and backslash escaped, other controls as \\u00xx, the rest as it is."""


def number(value: float) -> str:
    """Number::toString: with digits d1..dk and value = 0.d1..dk * 10^n, k <= n <= 21 integer, 0 < n <= 21
    point inside, -6 < n <= 0 leading zeros, else exponent n - 1."""
    if not math.isfinite(value):
        raise ValueError(f"{value} has no JSON")
    if value == 0:
        return "0"
    if value < 0:
        return "-" + number(-value)
    mantissa, _, exponent = repr(value).partition("e")
    whole, _, fraction = mantissa.partition(".")
    fraction = "" if fraction == "0" else fraction
    point = len(whole) + int(exponent or 0)
    digits = (whole + fraction).lstrip("0")
    point -= len(whole + fraction) - len(digits)
    digits = digits.rstrip("0")
    k = len(digits)
    if k <= point <= 21:
        return digits + "0" * (point - k)
    if 0 < point <= 21:
        return digits[:point] + "." + digits[point:]
    if -6 < point <= 0:
        return "0." + "0" * -point + digits
    power = f"e{'+' if point > 0 else '-'}{abs(point - 1)}"
    return digits[0] + ("." + digits[1:] if k > 1 else "") + power
