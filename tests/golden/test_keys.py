"""The keys of a config and their bounds are those that were last agreed to; `make goldens` rewrites the list."""

from tests.golden.keys import KEYS, render


def test_the_list_is_the_registry_s():
    assert render() == KEYS.read_text(encoding="ascii"), "a key or a bound has changed; if it should: make goldens"
