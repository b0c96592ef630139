"""The permutation is one, of every size, and looks drawn at random."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.data.permutation import Permutation
from nmoe.rng import key


@settings(max_examples=150, deadline=None, derandomize=True)
@given(n=st.integers(1, 5000), stream_key=st.integers(0, 2**63 - 1))
def test_bijection(n, stream_key):
    image = Permutation(n, stream_key)(np.arange(n))
    assert np.array_equal(np.sort(image), np.arange(n))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 9, 10, 99, 100, 101, 65535, 65536, 65537, 10**6])
def test_bijection_at_the_edges(n):
    assert np.array_equal(np.sort(Permutation(n, key(3, "t", n))(np.arange(n))), np.arange(n))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(n=st.integers(2**40, 2**62), first=st.integers(0, 2**40 - 300))
def test_huge_sizes_stay_inside_and_apart(n, first):
    image = Permutation(n, 11)(np.arange(first, first + 300))
    assert image.min() >= 0 and image.max() < n and len(set(image.tolist())) == 300


def test_an_index_alone_goes_where_it_goes_among_others():
    permutation = Permutation(1000, 5)
    together = permutation(np.arange(1000))
    assert [int(permutation(np.array(i))) for i in range(0, 1000, 37)] == together[::37].tolist()
    assert np.array_equal(permutation(np.arange(1000).reshape(10, 100)), together.reshape(10, 100))


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_are_equally_likely(n):
    """Chi-square over the n! orders of 1000 keys or more; 5 standard deviations."""
    orders = dict.fromkeys(itertools.permutations(range(n)), 0)
    for draw in range(max(1000, 10 * len(orders))):
        orders[tuple(Permutation(n, key(1, "uniform", draw))(np.arange(n)).tolist())] += 1
    expected = sum(orders.values()) / len(orders)
    chi_square = sum((count - expected) ** 2 / expected for count in orders.values())
    freedom = math.factorial(n) - 1
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


def test_positions_and_neighbours_are_unrelated():
    """Correlation of index and image, and of neighbours' images, within 5/sqrt(n) of none."""
    n = 40_000
    for draw in range(5):
        image = Permutation(n, key(2, "correlation", draw))(np.arange(n)).astype(float)
        assert abs(np.corrcoef(np.arange(n), image)[0, 1]) < 5 / math.sqrt(n)
        assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 5 / math.sqrt(n)


def test_keys_give_different_orders():
    images = {tuple(Permutation(50, stream_key)(np.arange(50)).tolist()) for stream_key in range(200)}
    assert len(images) == 200


def test_outside_is_refused():
    for index in (-1, 10):
        with pytest.raises(IndexError):
            Permutation(10, 0)(np.array([index]))
    for n in (0, 2**62 + 1):
        with pytest.raises(ValueError):
            Permutation(n, 0)


def test_pinned():
    """The order is part of every fingerprinted run: it must never change."""
    assert Permutation(10, 12345)(np.arange(10)).tolist() == PINNED


PINNED = [3, 0, 5, 4, 1, 7, 9, 6, 8, 2]
