"""What a finding quotes cannot steer the terminal that it is printed on."""

import pytest

from nmoe.errors import Diagnostic


@pytest.mark.parametrize("odd", ["\x1b[31m", "\x00", "\r", "\u202e", "\ud800", "\x7f"])
def test_only_printable_characters_are_rendered(odd):
    found = Diagnostic(code="N0001", message=f"a{odd}b", place=f"c{odd}", help=odd, notes=(f"d{odd}", "e"))
    said = found.render()
    assert odd not in said
    assert all(c.isprintable() or c == "\n" for c in said)
    assert said.startswith("error[N0001]: a?")
