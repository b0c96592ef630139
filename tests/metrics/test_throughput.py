"""Rates and the time to the end, on made-up clocks."""

import math

import pytest

from nmoe.errors import RunError
from nmoe.metrics.throughput import WINDOW, Throughput


def test_a_steady_run():
    rate = Throughput()
    assert rate.tokens_per_second == 0.0
    assert rate.eta_seconds(5) == math.inf
    for _ in range(10):
        rate.step(1000, 0.5)
    assert rate.tokens_per_second == pytest.approx(2000.0)
    assert rate.eta_seconds(6000) == pytest.approx(3.0)
    assert rate.eta_seconds(0) == rate.eta_seconds(-7) == 0.0
    assert rate.finish_ns(10, 6000) == 3_000_000_010


def test_a_stall_moves_the_rate_a_little():
    rate = Throughput()
    for _ in range(20):
        rate.step(1000, 0.5)
    rate.step(1000, 3600.0)
    assert 0.8 * 2000 < rate.tokens_per_second < 2000


def test_it_looks_back_on_the_window_only():
    rate = Throughput()
    for _ in range(500):
        rate.step(1000, 2.0)
    for _ in range(WINDOW):
        rate.step(1000, 1.0)
    assert rate.tokens_per_second == pytest.approx(1000.0)


def test_pauses_stretch_the_time_to_the_end_by_their_share():
    rate = Throughput()
    for _ in range(10):
        rate.step(1000, 1.0)
    rate.pause(2.0)
    rate.pause(3.0)
    assert rate.tokens_per_second == pytest.approx(1000.0)
    assert rate.eta_seconds(10_000) == pytest.approx(15.0)


def test_a_clock_that_stands_still():
    for tokens, seconds in ((1, 0.0), (0, 1.0), (1, -1.0), (1, math.nan)):
        with pytest.raises(RunError, match="N0407"):
            Throughput().step(tokens, seconds)
