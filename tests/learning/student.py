"""Student's t distribution: how far a mean or a new draw may lie from what a few seeds gave.

With T = sqrt(nu) tan(a), the density of a on (-pi/2, pi/2) is proportional to cos(a)^(nu - 1).
"""

import math
from functools import cache

import numpy as np


def tail(t: float, freedom: int) -> float:
    """P(T > t) with `freedom` degrees of freedom."""

    def area(low: float) -> float:
        angles = np.linspace(low, math.pi / 2, 20_001)
        return float(np.trapezoid(np.cos(angles) ** (freedom - 1), angles))

    return area(math.atan(t / math.sqrt(freedom))) / area(-math.pi / 2)


@cache
def quantile(chance: float, freedom: int) -> float:
    """The t > 0 with P(T > t) = chance, 0 < chance < 1/2."""
    low, high = 0.0, 1.0
    while tail(high, freedom) > chance:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, freedom) > chance else (low, middle)
    return high


def band(values: np.ndarray, further: int, chance: float) -> tuple[float, float]:
    """Where the mean of m further draws lies, but for `chance`, after n normal ones: mean +- t s sqrt(1/m + 1/n)."""
    n = len(values)
    half = quantile(chance / 2, n - 1) * float(values.std(ddof=1)) * math.sqrt(1 / further + 1 / n)
    return float(values.mean()) - half, float(values.mean()) + half
