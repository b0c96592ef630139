"""A keyed bijection of 0 .. n-1 that is computed, not stored.

The order in which an epoch visits its windows must be random, the same on every rank, available
from any index at once, and take no memory for a billion windows. A Feistel network over a
rectangle does this (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002): with
a = ceil(sqrt(n)) and b = ceil(n / a), write x = l + a r, l < a, r < b, and let the rounds alternate

    l <- (l + F_i(r)) mod a        r <- (r + F_i(l)) mod b

Each round can be undone, so the whole is a bijection of 0 .. ab-1 for any F. Since ab - n < a, only
about one index in sqrt(n) lands at n or above; it is sent through again until it lands below
("cycle walking"), which keeps the map a bijection of 0 .. n-1.

F_i is a 64-bit mixer (the finaliser of Steele, Lea and Flood's SplitMix, OOPSLA 2014) of the input
and the round's key. This shuffles; it does not hide anything from an adversary.
"""

import math

import numpy as np

from nmoe.rng import key

ROUNDS = 12
MAX_SIZE = 2**62


class Permutation:
    """The bijection of 0 .. n-1 named by `stream_key` (64 bits, from nmoe.rng.key).

    1 <= n <= 2^62; ValueError otherwise.
    """

    def __init__(self, n: int, stream_key: int):
        if not 1 <= n <= MAX_SIZE:
            raise ValueError(f"a permutation of {n} elements; 1 to 2^62 can be made")
        self.n = n
        root = math.isqrt(n - 1) + 1 if n > 1 else 1
        self._a = np.uint64(root)
        self._b = np.uint64(-(-n // root))
        self._keys = [np.uint64(key(stream_key, "permutation round", i)) for i in range(ROUNDS)]

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Where each index goes: int64 in, int64 out, any shape; IndexError outside 0 .. n-1."""
        index = np.asarray(index, np.int64)
        if index.size and (index.min() < 0 or index.max() >= self.n):
            raise IndexError(f"an index outside 0 .. {self.n - 1}")
        x = self._rounds(index.astype(np.uint64))
        limit = np.uint64(self.n)
        outside = x >= limit
        while outside.any():
            x[outside] = self._rounds(x[outside])
            outside = x >= limit
        return x.astype(np.int64)

    def _rounds(self, x: np.ndarray) -> np.ndarray:
        a, b = self._a, self._b
        left: np.ndarray = x % a
        right: np.ndarray = x // a
        for i, round_key in enumerate(self._keys):
            if i % 2 == 0:
                left = (left + _mix(right, round_key) % a) % a
            else:
                right = (right + _mix(left, round_key) % b) % b
        return np.atleast_1d(left + a * right).reshape(x.shape)


def _mix(x: np.ndarray, round_key: np.uint64) -> np.ndarray:
    """64 well-mixed bits of each x; arithmetic modulo 2^64."""
    with np.errstate(over="ignore"):
        z = x * np.uint64(0x9E3779B97F4A7C15) + round_key
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
