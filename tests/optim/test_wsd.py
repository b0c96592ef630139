"""The schedule against its formula, at and around every breakpoint."""

import math
from fractions import Fraction

import pytest

from nmoe.errors import RunError
from nmoe.optim.wsd import Wsd
from nmoe.registry.schedule import Wsd as Spec


def test_breakpoints():
    schedule = Wsd(warmup_tokens=100, stable_tokens=50, decay_tokens=200, decay_shape="linear")
    assert schedule.total_tokens == 350
    expected = {0: 0.0, 1: 0.01, 25: 0.25, 99: 0.99, 100: 1.0, 101: 1.0, 149: 1.0, 150: 1.0}
    expected |= {151: 1 - 1 / 200, 250: 0.5, 349: 1 - 199 / 200, 350: 0.0, 351: 0.0, 10**15: 0.0}
    assert {tokens: schedule.scale(tokens) for tokens in expected} == expected


@pytest.mark.parametrize(
    ("shape", "formula"),
    [
        ("linear", lambda u: 1 - u),
        ("cosine", lambda u: (1 + math.cos(math.pi * u)) / 2),
        ("sqrt", lambda u: 1 - math.sqrt(u)),
    ],
)
def test_shapes_of_decay(shape, formula):
    schedule = Wsd(warmup_tokens=0, stable_tokens=7, decay_tokens=1000, decay_shape=shape)
    for tokens in range(7, 1008, 13):
        assert schedule.scale(tokens) == pytest.approx(formula(float(Fraction(tokens - 7, 1000))), abs=1e-15)
    assert schedule.scale(7) == 1.0
    assert schedule.scale(1007) == 0.0
    values = [schedule.scale(tokens) for tokens in range(1100)]
    assert all(0.0 <= value <= 1.0 for value in values)
    assert values == sorted(values, reverse=True)


def test_a_schedule_without_decay_stays_at_its_peak():
    schedule = Wsd(warmup_tokens=10, stable_tokens=10, decay_tokens=0, decay_shape="linear")
    assert schedule.scale(20) == schedule.scale(25) == 1.0


def test_only_warmup():
    schedule = Wsd(warmup_tokens=10, stable_tokens=0, decay_tokens=0, decay_shape="linear")
    assert [schedule.scale(tokens) for tokens in (5, 10, 11)] == [0.5, 1.0, 1.0]


def test_beyond_float_integers_of_32_bits():
    schedule = Wsd(warmup_tokens=2**52, stable_tokens=0, decay_tokens=2**52 - 1, decay_shape="linear")
    assert schedule.scale(2**51) == 0.5
    assert schedule.scale(schedule.total_tokens) == 0.0


def test_refusals_name_the_schedule():
    for warmup, stable, decay, shape in ((0, 0, 0, "linear"), (-1, 5, 5, "linear"), (1, 1, 1, "step")):
        with pytest.raises(RunError, match=r"N0520(.|\n)*\[schedule\]"):
            Wsd(warmup_tokens=warmup, stable_tokens=stable, decay_tokens=decay, decay_shape=shape)
    with pytest.raises(RunError, match="N0520"):
        Wsd(warmup_tokens=1, stable_tokens=1, decay_tokens=1, decay_shape="linear").scale(-1)


def test_the_spec_builds_it():
    spec = Spec(warmup_tokens=3, stable_tokens=5, decay_tokens=7, decay_shape="sqrt")
    built = spec.build()
    assert built.total_tokens == spec.total_tokens == 15
    assert built.scale(15) == 0.0
