"""JSON by the book: what Python's reader takes and the standard, or another reader, does not."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.strict_json import DEPTH_LIMIT, loads

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(values, st.booleans())
def test_reads_what_the_standard_library_writes(value, ascii):
    assert loads(json.dumps(value, ensure_ascii=ascii).encode()) == value


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b'{"a": 1, "a": 1}', b'[{"a": {"b": 1, "b": 2}}]', b"NaN", b"[-Infinity]", b"1e999", b"[-1e400]",
        b'"\\ud800"', b'{"\\udfff": 1}', b'[["\\ud83d"]]', b"\xff", b"\xef\xbb\xbf{}", "{}".encode("utf-16"),
        b"9" * 5000, b"[" * 100_000, b"[" * 10_000 + b"]" * 10_000, b'{"a":' * 10_000, b"{} {}", b"'a'", b"\x00",
    ],
)  # fmt: skip
def test_refuses(content):
    with pytest.raises(ValueError):
        loads(content)


def test_nests_as_deep_as_the_limit():
    loads(b"[" * DEPTH_LIMIT + b"]" * DEPTH_LIMIT)
    with pytest.raises(ValueError, match="nests deeper"):
        loads(b"[" * (DEPTH_LIMIT + 2) + b"]" * (DEPTH_LIMIT + 2))
