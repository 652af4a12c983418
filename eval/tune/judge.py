"""Whether a loss is under what was allowed, with confidence: a non-inferiority test on paired answers.

Every picture gives one number, its mean loss over its prompts (the unpruned model's score less the pruned one's, from
-1 to 1). The bound of their mean is the larger of two, each of which is too small somewhere: Agresti and Min's for
paired shares (Statistics in Medicine 2005), whose normal approximation is hopeful where nothing differs, and the exact
one of Clopper and Pearson for a share as large as the net loss. Fractions count as parts of a picture, which is on the
safe side: of all quantities between the same bounds with the same mean a share spreads most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from vlmprune.eval.statistics import exact_share

__all__ = ["CONFIDENCE", "LossVerdict", "judge", "more_pictures"]

CONFIDENCE = 0.95
MOST = 10**6  # pictures; more than that nobody has


@dataclass(frozen=True)
class LossVerdict:
    """What may be said of a loss.

    Attributes:
        loss: mean over pictures.
        low, high: one-sided bounds of it, each with the confidence.
        pictures: how many there were.
        answer: "yes" (it is under the limit), "no" (it is over it) or "open".
        more: about how many more pictures would make it "yes" if the loss stays as it is; None where none would.
    """

    loss: float
    low: float
    high: float
    pictures: int
    answer: str
    more: int | None = None


def bounds(lost: float, gained: float, pictures: int, miss: float) -> tuple[float, float]:
    """One-sided bounds of the mean loss.

    Args:
        lost, gained: sums over pictures of what was lost, and of what was gained.
        miss: how often a bound may be wrong.
    """
    z, n = NormalDist().inv_cdf(1 - miss), pictures + 2
    middle = (lost - gained) / n
    reach = z * math.sqrt(max(0.0, (lost + gained + 1) - (lost - gained) ** 2 / n)) / n
    net = (lost - gained) / pictures
    low, high = exact_share(abs(net), pictures, miss)
    low, high = (low, high) if net >= 0 else (-high, -low)
    return max(-1.0, min(middle - reach, low)), min(1.0, max(middle + reach, high))


def judge(losses: Sequence[float], limit: float, tested: int = 1) -> LossVerdict:
    """Test a loss against a limit.

    Args:
        losses: of every picture.
        limit: the largest mean loss that is allowed.
        tested: how many candidates are tested beside each other: all statements hold together (Bonferroni).
    """
    lost, gained, count = sum(max(x, 0.0) for x in losses), sum(max(-x, 0.0) for x in losses), len(losses)
    miss = (1 - CONFIDENCE) / tested
    low, high = bounds(lost, gained, count, miss)
    answer = "yes" if high < limit else "no" if low > limit else "open"
    more = more_pictures(lost, gained, count, limit, miss) if answer == "open" else None
    return LossVerdict((lost - gained) / count, low, high, count, answer, more)


def more_pictures(lost: float, gained: float, count: int, limit: float, miss: float) -> int | None:
    """How many more pictures with as much lost and gained on each would do; None where none would."""

    def enough(pictures: int) -> bool:
        times = pictures / count
        return bounds(lost * times, gained * times, pictures, miss)[1] < limit

    if (lost - gained) / count >= limit or not enough(MOST):
        return None
    low, high = count, MOST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high - count
