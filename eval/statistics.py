"""What may be said about a difference: bootstrap over clusters, retention, Pareto front. Arrays in, numbers out.

All methods answer the same questions, so they are compared question by question (paired). Questions about one picture
are not independent, so whole clusters (pictures, or single questions where the picture is not known) are drawn with
replacement: the percentile interval of a ratio of sums (Efron & Tibshirani 1993, chapters 6 and 13).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["DRAWS", "FEW_CLUSTERS", "ROUND_OFF", "SEED", "Estimate", "Resampler", "bounded_interval", "difference"]
__all__ += ["difference_interval", "free_interval", "holm", "interval", "mean", "pareto", "retention", "sign_flip"]
__all__ += ["verdict"]

#: Bootstrap draws, and the seed that makes two reports of one run the same.
DRAWS = 2000
SEED = 0
#: With fewer clusters a percentile interval is too narrow to be trusted (it still is given, with a warning).
FEW_CLUSTERS = 20
#: Below this a difference of means is round-off of sums taken in another order.
ROUND_OFF = 1e-12


@dataclass(frozen=True)
class Estimate:
    """A mean over samples with its 95 % interval over clusters; no interval is None."""

    value: float
    low: float | None = None
    high: float | None = None


class Resampler:
    """Draws clusters with replacement, once, so that everything averaged with it is compared on the same draws.

    Args:
        clusters: names of what is drawn; repetitions count once.
        draws: how often.
        seed: of the draws; they depend on the number of clusters and on nothing else.
    """

    def __init__(self, clusters: Sequence[str], draws: int = DRAWS, seed: int = SEED):
        self.position = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
        self.draws, self.seed = draws, seed

    def __len__(self) -> int:
        return len(self.position)

    def counts(self, chunk: int = 200) -> Iterator[np.ndarray]:
        """How often each cluster was drawn: (draws, clusters) float, some rows at a time to bound the memory."""
        rng, size = np.random.default_rng(self.seed), len(self)
        for start in range(0, self.draws, chunk):
            rows = min(chunk, self.draws - start)
            drawn = rng.integers(size, size=(rows, size)) + size * np.arange(rows)[:, None]
            yield np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size).astype(float)

    def means(self, clusters: Sequence[str], values: np.ndarray) -> np.ndarray:
        """Mean over samples in every draw.

        Args:
            clusters: (samples,) each sample's cluster, all of them known to this object.
            values: (samples,) or (samples, columns).

        Returns:
            (draws,) or (draws, columns); NaN where a draw has none of the samples.
        """
        values = np.asarray(values, float)
        flat = values.reshape(len(values), -1)
        where = np.array([self.position[name] for name in clusters])
        sums, sizes = np.zeros((len(self), flat.shape[1])), np.bincount(where, minlength=len(self)).astype(float)
        np.add.at(sums, where, flat)
        made = []
        for counts in self.counts():
            total = (counts @ sizes)[:, None]
            made.append(
                np.divide(counts @ sums, total, out=np.full((len(counts), flat.shape[1]), np.nan), where=total > 0)
            )
        return np.concatenate(made).reshape(-1, *values.shape[1:])


def interval(draws: np.ndarray) -> tuple[float, float]:
    """Percentile 95 % interval of (draws,) bootstrap values; draws that are not finite are left out.

    Raises:
        ValueError: no draw is finite.
    """
    draws = np.asarray(draws, float)
    finite = draws[np.isfinite(draws)]
    if not len(finite):
        raise ValueError("no bootstrap draw has a value")
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)


def bounded_interval(draws: np.ndarray, value: float, clusters: int, low: float, high: float) -> tuple[float, float]:
    """`interval` of a mean whose clusters lie between `low` and `high`.

    Where all clusters are equal, drawing them again shows no spread, which proves nothing about others: there the
    interval is the exact one of Clopper and Pearson (1934) for a share of `clusters`, its number of successes read as a
    real number. Of all quantities between the same bounds with the same mean a share spreads most, so for means of
    several questions it is on the safe side.

    Args:
        draws: (draws,) bootstrap values.
        value: the mean itself.
        clusters: how many there are.
        low, high: what no cluster can go beyond.
    """
    found = interval(draws)
    if found[1] - found[0] > ROUND_OFF * max(1.0, high - low):
        return found
    share = min(1.0, max(0.0, (value - low) / (high - low)))
    return tuple(low + (high - low) * end for end in exact_share(share, clusters))


def difference_interval(draws: np.ndarray, value: float, clusters: int, top: float) -> tuple[float, float]:
    """`bounded_interval` of a paired difference of two means between 0 and `top`.

    Where no cluster differs at all, the exact bound is on the share of clusters that do.
    """
    if abs(value) < ROUND_OFF and np.ptp(draws) < ROUND_OFF:
        reach = top * exact_share(0.0, clusters)[1]
        return -reach, reach
    return bounded_interval(draws, value, clusters, -top, top)


def free_interval(draws: np.ndarray) -> tuple[float, float] | tuple[None, None]:
    """`interval` of what no bounds are known of: none where the draws show no spread, which proves nothing."""
    low, high = interval(draws)
    return (low, high) if high - low > ROUND_OFF else (None, None)


def mean(draws: np.ndarray | None, value: float, clusters: int, top: float | None) -> Estimate:
    """A mean with its interval.

    Args:
        draws: (draws,) bootstrap values; None where there are none (a single cluster, no scores per sample).
        value: the mean itself.
        clusters: how many there are.
        top: what no cluster can go beyond, none being below 0; None where that is not known.
    """
    if draws is None:
        return Estimate(value)
    return Estimate(value, *(free_interval(draws) if top is None else bounded_interval(draws, value, clusters, 0, top)))


def difference(
    draws: np.ndarray | None, value: float, clusters: int, top: float | None, same: bool, higher_is_better: bool = True
) -> tuple[Estimate, str | None]:
    """A paired difference of two such means with its interval, and in a word; None without draws or an interval.

    Args:
        draws, value, clusters: as of `mean`, of the difference.
        top: of either mean.
        same: whether no sample differs: then the word is `equal`, and the interval is about samples not seen.
        higher_is_better: of the two means.
    """
    if draws is None:
        return Estimate(value), None
    ends = free_interval(draws) if top is None else difference_interval(draws, value, clusters, top)
    word = "equal" if same else None if ends[0] is None else verdict(*ends, higher_is_better)
    return Estimate(value, *ends), word


def exact_share(share: float, count: int, miss: float = 0.025) -> tuple[float, float]:
    """Clopper and Pearson's interval of a share of `count`, with `miss` on either side."""
    hits = share * count
    below = 0.0 if hits <= 0 else beta_quantile(miss, hits, count - hits + 1)
    above = 1.0 if hits >= count else beta_quantile(1 - miss, hits + 1, count - hits)
    return below, above


def beta_quantile(probability: float, a: float, b: float) -> float:
    """Where Beta(a, b) has so much below it, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if beta_below(middle, a, b) < probability else (low, middle)
    return (low + high) / 2


def beta_below(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function, by its continued fraction (Abramowitz & Stegun 26.5.8)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # there the other tail converges
        return 1 - beta_below(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    fraction = 1.0
    for m in range(200, 0, -1):  # from the inside out
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        fraction = 1 + even / (1 + odd / fraction)
    return front / a / (1 - (a + b) * x / (a + 1) / fraction)


def verdict(low: float, high: float, higher_is_better: bool = True) -> str:
    """A difference in a word: `noise` if its interval has 0 in it, `equal` if it is only 0, or `better` or `worse`."""
    if max(abs(low), abs(high)) < ROUND_OFF:
        return "equal"
    if low <= ROUND_OFF and high >= -ROUND_OFF:
        return "noise"
    return "better" if (low > 0) == higher_is_better else "worse"


def sign_flip(differences: Sequence[float], parts: int = 840) -> float:
    """Two-sided p of paired differences by Fisher's randomization test, exact: if two methods are alike, each
    difference has either sign as easily, and p is the share of all 2**n assignments of signs whose sum is at least as
    far from 0 as the one seen (Fisher 1935, The Design of Experiments, section 21).

    No distribution is assumed and nothing is drawn, so p can be as small as 2 / 2**n: small enough to stay below 5 %
    after a correction for a thousand comparisons.

    Args:
        differences: (n,) of independent pairs, here a picture's summed difference of two methods. A 0 decides nothing.
        parts: of 1 that they are rounded to, so that sums can be counted; those of scores that are 0 or 1, or means of
            up to 8 such, are then exact.

    Returns:
        1 where no pair differs.
    """
    steps = np.abs(np.rint(np.asarray(differences, float) * parts)).astype(int)
    seen = abs(int(np.rint(np.asarray(differences, float) * parts).sum()))
    steps = steps[steps > 0]
    unit = int(np.gcd.reduce(steps)) if len(steps) else 1
    steps, seen = steps // unit, seen // unit
    # shares[i]: of all assignments so far, those whose negative differences sum up to i
    shares = np.zeros(int(steps.sum()) + 1)
    shares[0] = 1.0
    for step in steps:
        shares[step:] = (shares[step:] + shares[: len(shares) - step]) / 2
        shares[:step] /= 2
    sums = len(shares) - 1 - 2 * np.arange(len(shares))
    return float(min(1.0, shares[np.abs(sums) >= seen].sum()))


def holm(p: Sequence[float]) -> np.ndarray:
    """(n,) p values adjusted for n comparisons: of those under 0.05, with 95 % confidence not one is chance.

    Step-down (Holm 1979): the smallest times n, the next times n - 1 and so on, none below one before it, at most 1.
    """
    p = np.asarray(p, float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def retention(value: float | np.ndarray, full: float | np.ndarray, higher_is_better: bool = True) -> np.ndarray:
    """Share of the unpruned model's score that is left: value / full, or full / value where less is better.

    Scale-free, so scores of any unit can be averaged. NaN where it is not defined (division by 0, or a negative score).
    """
    top, below = (value, full) if higher_is_better else (full, value)
    top, below = np.asarray(top, float), np.asarray(below, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((below > 0) & (top >= 0), top / below, np.nan)


def pareto(costs: Sequence[float], values: Sequence[float]) -> np.ndarray:
    """(n,) bool: the points that no other point beats, with less or equal cost and higher or equal value.

    Of equal points all are on the front. Points with a NaN never are.
    """
    costs, values = np.asarray(costs, float), np.asarray(values, float)
    known = np.isfinite(costs) & np.isfinite(values)
    cheap, good = costs[:, None] <= costs, values[:, None] >= values  # [i, j]: i is no worse than j
    better = cheap & good & ((costs[:, None] < costs) | (values[:, None] > values)) & known[:, None]
    return known & ~better.any(0)
