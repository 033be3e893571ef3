"""Confidence intervals of proportions, and McNemar's exact test of paired outcomes."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

_Z = NormalDist().inv_cdf(0.975)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion (Wilson 1927); (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, _Z * _Z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low = 0.0 if successes == 0 else middle - half
    high = 1.0 if successes == n else middle + half
    return low, high


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided exact McNemar p-value of two paired outcomes (McNemar 1947)."""
    n, k = only_first + only_second, min(only_first, only_second)
    if n == 0:
        return 1.0
    tail: float = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    return min(1.0, 2 * tail)


def _at_most(k: int, n: int, p: float) -> float:
    """Return P(X <= k) of a binomial X, summed in logarithms so that no term overflows."""
    if p <= 0 or k >= n:
        return 1.0
    if p >= 1:
        return 0.0
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
            + i * math.log(p) + (n - i) * math.log1p(-p) for i in range(k + 1)]
    top = max(logs)
    return min(1.0, math.exp(top) * sum(math.exp(v - top) for v in logs))


def clopper_pearson(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return the lower and the upper one-sided exact bound (Clopper and Pearson 1934)."""
    def solve(above: Callable[[float], bool]) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if above(middle) else (low, middle)
        return (low + high) / 2
    lower = 0.0 if k == 0 else solve(lambda p: 1 - _at_most(k - 1, n, p) < 1 - level)
    upper = 1.0 if k == n else solve(lambda p: _at_most(k, n, p) > 1 - level)
    return lower, upper
