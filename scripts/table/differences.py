"""Differences that are paired by question, and corrected for how many there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlmprune.eval import statistics

#: Below this an adjusted p says that a difference is none of chance.
SURE = 0.05


@dataclass
class Against:
    """A paired difference to a base row, in points."""

    value: float
    low: float
    high: float
    p: float
    adjusted: float = 1.0

    @property
    def sure(self) -> bool:
        """Whether it is one after the correction for all comparisons."""
        return self.adjusted < SURE

    @property
    def better(self) -> bool:
        return self.sure and self.value > 0

    @property
    def worse(self) -> bool:
        return self.sure and self.value < 0

    def __str__(self) -> str:
        told = f"{self.value:+.1f}"
        return f"{f'**{told}**' if self.sure else told} [{self.low:+.1f}, {self.high:+.1f}]"


def correct(found: Sequence[Against]) -> int:
    """Correct comparisons for how many they are; returns that."""
    for against, p in zip(found, statistics.holm([one.p for one in found]), strict=True):
        against.adjusted = float(p)
    return len(found)


def differences(names: Sequence[str], scores: Sequence[np.ndarray], bases: Sequence[np.ndarray]) -> list[Against]:
    """Of pairs of scores `(questions,)`, by questions; those of one name are drawn, and given signs, together."""
    if not scores:
        return []
    apart, resampler = np.stack(scores, 1) - np.stack(bases, 1), statistics.Resampler(names)
    where = np.array([resampler.position[name] for name in names])
    made = []
    for drawn, column in zip(resampler.means(names, apart).T, apart.T, strict=True):
        found, _ = statistics.difference(drawn, float(column.mean()), len(resampler), 1.0, not column.any())
        p = statistics.sign_flip(np.bincount(where, column, len(resampler)))
        made.append(Against(100 * found.value, 100 * found.low, 100 * found.high, p))
    return made
