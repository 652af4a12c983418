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


def plain_difference(apart: np.ndarray) -> Against:
    """A mean difference of questions, without an interval."""
    value = 100 * float(apart.mean())
    return Against(value, value, value, statistics.sign_flip(apart))
