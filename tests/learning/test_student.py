"""Student's t against printed tables (Fisher and Yates) and against the normal distribution."""

from statistics import NormalDist

import numpy as np
import pytest

from tests.learning.student import band, quantile, tail


@pytest.mark.parametrize(
    ("freedom", "chance", "t"),
    [(1, 0.025, 12.706), (2, 0.005, 9.925), (5, 0.005, 4.032), (10, 0.025, 2.228), (11, 0.0005, 4.437)],
)
def test_is_the_printed_table(freedom, chance, t):
    assert quantile(chance, freedom) == pytest.approx(t, abs=5e-4)
    assert tail(t, freedom) == pytest.approx(chance, rel=2e-3)


def test_many_degrees_of_freedom_are_the_normal_distribution():
    assert quantile(0.001, 100_000) == pytest.approx(NormalDist().inv_cdf(0.999), abs=1e-3)


def test_further_draws_miss_the_band_as_often_as_they_may():
    draws = np.random.default_rng(0).normal(3.0, 2.0, (4000, 7))
    missed = 0
    for row in draws:
        low, high = band(row[:4], 3, 0.1)
        missed += not low < row[4:].mean() < high
    # Binomial(4000, 0.1): a standard deviation of 19.
    assert abs(missed - 400) < 5 * 19
