"""The first losses of the CPU configs are those of the golden files."""

import pytest

from tests.golden.losses import LOSSES, SETS, STEPS, TOLERANCE, kind, losses, parse


def test_each_has_its_file():
    assert {path.stem for path in LOSSES.glob("*.txt")} == set(SETS) == set(TOLERANCE)


@pytest.mark.parametrize("name", SETS)
def test_losses(name):
    """Bit for bit on the kind of machine that made the file, within the tolerance on another."""
    made_on, expected = parse((LOSSES / f"{name}.txt").read_text(encoding="ascii"))
    assert len(expected) == STEPS
    found = losses(name)
    if kind() == made_on:
        assert [value.hex() for value in found] == [value.hex() for value in expected]
    else:
        assert found == pytest.approx(expected, rel=TOLERANCE[name])
