"""Medians, their intervals, and how they are written down."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from statistics import median, quantiles

__all__ = ["median_interval", "ratio", "spread"]


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Interval of the median by order statistics, which assumes nothing about the values' distribution.

    The narrowest symmetric pair of ranks with at least `level` coverage (96.5 % for 15 values); all values where they
    are too few for it (5 or fewer).
    """
    ordered, n = sorted(values), len(values)
    inner = 0
    # the pair of ranks (j, n + 1 - j), from 1, covers the median with 1 - 2 P(Binomial(n, 1/2) < j)
    for j in range(1, (n + 1) // 2 + 1):
        if 1 - 2 * sum(comb(n, i) for i in range(j)) / 2**n >= level:
            inner = j - 1
    return ordered[inner], ordered[n - 1 - inner]


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of repeated times, in milliseconds, and how many there were."""
    low, _, high = quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    return {"median": 1e3 * median(seconds), "low": 1e3 * low, "high": 1e3 * high, "runs": len(seconds)}


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Median of paired ratios with its 95 % interval, and the number of pairs."""
    values = [a / b for a, b in zip(above, below, strict=True)]
    low, high = median_interval(values)
    return {"median": median(values), "low": low, "high": high, "pairs": len(values)}
