"""Canonical JSON against RFC 8785's own examples and tables, and against the properties that define it."""

import json
import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmoe.plan.canonical import canonical, number

# RFC 8785, appendix B: bits of a double, and its text.
NUMBERS = """
0000000000000000 0
8000000000000000 0
0000000000000001 5e-324
8000000000000001 -5e-324
7fefffffffffffff 1.7976931348623157e+308
ffefffffffffffff -1.7976931348623157e+308
4340000000000000 9007199254740992
c340000000000000 -9007199254740992
4430000000000000 295147905179352830000
44b52d02c7e14af5 9.999999999999997e+22
44b52d02c7e14af6 1e+23
44b52d02c7e14af7 1.0000000000000001e+23
444b1ae4d6e2ef4e 999999999999999700000
444b1ae4d6e2ef4f 999999999999999900000
444b1ae4d6e2ef50 1e+21
3eb0c6f7a0b5ed8c 9.999999999999997e-7
3eb0c6f7a0b5ed8d 0.000001
41b3de4355555553 333333333.3333332
41b3de4355555554 333333333.33333325
41b3de4355555555 333333333.3333333
41b3de4355555556 333333333.3333334
41b3de4355555557 333333333.33333343
becbf647612f3696 -0.0000033333333333333333
43143ff3c1cb0959 1424953923781206.2
"""


@pytest.mark.parametrize("line", NUMBERS.strip().splitlines())
def test_numbers_of_the_rfc(line):
    bits, text = line.split()
    assert number(struct.unpack(">d", bytes.fromhex(bits))[0]) == text


def test_the_example_of_the_rfc():
    """Section 3.2.2 and 3.2.3: its input, and the bytes that it gives for it."""
    source = (
        '{"numbers": [333333333.33333329, 1E30, 4.50, 2e-3, 0.000000000000000000000000001],'
        '"string": "\\u20ac$\\u000F\\u000aA\'\\u0042\\u0022\\u005c\\\\\\"\\/", "literals": [null, true, false]}'
    )
    expected = bytes.fromhex(
        "7b226c69746572616c73223a5b6e756c6c2c747275652c66616c73655d2c226e"
        "756d62657273223a5b3333333333333333332e333333333333332c31652b3330"
        "2c342e352c302e3030322c31652d32375d2c22737472696e67223a22e282ac24"
        "5c75303030665c6e4127425c225c5c5c5c5c222f227d"
    )
    assert canonical(json.loads(source)) == expected


def test_keys_are_sorted_by_utf16_units():
    """Section 3.2.3's example: an emoji's surrogates sort before the Hebrew letter's presentation form."""
    keys = ["\u20ac", "\r", "\ufb33", "1", "\U0001f600", "\u0080", "\u00f6"]
    text = canonical(dict.fromkeys(keys, 0)).decode()
    assert list(json.loads(text)) == ["\r", "1", "\u0080", "\u00f6", "\u20ac", "\U0001f600", "\ufb33"]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_reads_back_to_the_same_bits(value):
    text = number(value)
    assert float(text) == value
    assert not text.startswith(("+", ".", "-."))
    digits = text.lstrip("-").partition("e")[0].replace(".", "").strip("0")
    assert len(digits) <= 17
    exponent = "e" in text
    assert exponent == (value != 0 and not 1e-6 <= abs(value) < 1e21)


@given(st.integers(-(2**53) + 1, 2**53 - 1))
def test_an_integer_and_its_float_are_one_text(value):
    assert canonical(value) == canonical(float(value)) == str(value).encode()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(VALUES)
def test_it_is_json_of_the_same_value_and_canonical_again(value):
    text = canonical(value)
    assert canonical(json.loads(text, parse_int=float)) == text  # 1e20 is written without an exponent


@pytest.mark.parametrize("value", [math.nan, math.inf, 2**53, -(2**53), "\ud800"])
def test_what_has_no_text_is_refused(value):
    with pytest.raises(ValueError):
        canonical(value)


@pytest.mark.parametrize("value", [{1: 2}, object(), b"x", {"a": {2, 3}}])
def test_other_types_are_refused(value):
    with pytest.raises(TypeError):
        canonical(value)
