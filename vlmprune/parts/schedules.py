"""Budgets of methods that cut in several steps: a published schedule, stretched to what a user asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from vlmprune.parts.budget import count, floored
from vlmprune.parts.cuts import schedule_layers

__all__ = ["Scaled", "Schedule", "decoder_cuts", "nearest"]


def decoder_cuts(name: str, layers: tuple[int, ...], depth: int) -> list[int]:
    """Decoder layers to cut at, of layers of a 32-layer decoder (`schedule_layers`).

    Args:
        name: of the option that they come from, for the error.

    Raises:
        ValueError: this decoder has too few layers.
    """
    scaled = schedule_layers(layers, depth)
    if scaled[-1] >= depth:
        raise ValueError(f"{name}={layers} scale to {scaled}, and this model has {depth} layers.")
    return scaled


@dataclass(frozen=True)
class Schedule:
    """How many tokens several cuts leave.

    With `keep` or `average` every cut removes the published share of the tokens times one factor, never more than all,
    so that the last cut leaves `keep`, or the mean over all layers is `average`.

    Attributes:
        ratios: what each cut leaves of the tokens that entered the LLM; 0 stands for a single token.
        shares: of all decoder layers, those that run with what each cut left.
        keep, average: at most one of them; a count of tokens or a fraction.
    """

    ratios: tuple[float, ...]
    shares: tuple[float, ...] = ()
    keep: int | float | None = None
    average: int | float | None = None

    @classmethod
    def at(
        cls,
        layers: Sequence[int],
        depth: int,
        ratios: tuple[float, ...],
        keep: int | float | None,
        average: int | float | None,
    ) -> Schedule:
        """The schedule of cuts at decoder layers; of a fraction as `average` it is found out here whether it can be.

        Raises:
            ValueError: `average` cannot be met.
        """
        made = cls(ratios, tuple((b - a) / depth for a, b in pairwise([*layers, depth])), keep, average)
        if isinstance(average, float):
            made.left(10**9, 0)
        return made

    def left(self, total: int, stage: int) -> int:
        """Tokens that stay of an image's `total` behind a cut: at least 1, but 0 of 0.

        Raises:
            ValueError: `average` cannot be met.
        """
        if total == 0:
            return 0
        removed = [1 - ratio for ratio in self.ratios]
        if self.keep is None and self.average is None:
            return max(1, floored(total * self.ratios[stage]))
        if self.average is None:
            left = count(self.keep, total)
            if stage == len(removed) - 1:
                return left
            factor = (1 - left / total) / removed[-1]
        else:
            wanted = min(1.0, self.average / total if isinstance(self.average, int) else self.average)
            factor = self.factor(1 - wanted)
        return max(1, floored(total * (1 - min(1.0, factor * removed[stage]))))

    def factor(self, saved: float) -> float:
        """What to stretch the removed shares by so that a share `saved` of tokens times layers is gone."""
        removed = [1 - ratio for ratio in self.ratios]
        for full in range(len(removed)):  # the last `full` cuts take all
            open_ = len(removed) - full
            part = sum(s * r for s, r in zip(self.shares[:open_], removed, strict=False))
            rest = saved - sum(self.shares[open_:])
            if part > 0 and 0 <= rest / part <= 1 / removed[open_ - 1]:
                return rest / part
        raise ValueError(
            f"average={self.average} cannot be met with these cuts: even with nothing left after the first one the "
            f"average is {1 - sum(self.shares):.3f} of the tokens."
        )


@dataclass(frozen=True)
class Scaled(Schedule):
    """A schedule of which the ratios say how the cuts stand to each other: a budget scales all of them by one factor.

    So that what later cuts leave of what they get can be chosen freely, and the first cut follows.
    """

    def left(self, total: int, stage: int) -> int:
        """As of `Schedule`.

        Raises:
            ValueError: the first cut would have to leave more than there is, or nothing.
        """
        asked = self.keep if self.average is None else self.average
        wanted = asked / total if isinstance(asked, int) and total else asked
        if total == 0 or (wanted is not None and wanted >= 1):
            return total
        if self.average is None and asked is not None and stage == len(self.ratios) - 1:
            return count(asked, total)
        return max(1, floored(total * self.scale(wanted) * self.ratios[stage]))

    def scale(self, wanted: float | None) -> float:
        """What the ratios are multiplied by for a share of all tokens."""
        if wanted is None:
            return 1.0
        before = 1 - sum(self.shares)  # layers that see all
        mean = sum(share * ratio for share, ratio in zip(self.shares, self.ratios, strict=True))
        factor = wanted / self.ratios[-1] if self.average is None else (wanted - before) / mean
        if not 0 < factor * self.ratios[0] <= 1 + 1e-9:
            word, asked = ("keep", self.keep) if self.average is None else ("average", self.average)
            raise ValueError(
                f"{word}={asked} cannot be met with these cuts: the first would have to leave "
                f"{factor * self.ratios[0]:.3f} of the tokens."
            )
        return factor


def nearest(published: Sequence[Schedule], keep: int | float | None, average: int | float | None, total: int) -> int:
    """Which of several published schedules is nearest to a budget of an image's `total`; the first without one."""
    asked = keep if average is None else average
    if asked is None:
        return 0
    share = min(1.0, asked / total) if isinstance(asked, int) else asked

    def off(schedule: Schedule) -> float:
        last = schedule.ratios[-1]
        mean = 1 - sum(s * (1 - r) for s, r in zip(schedule.shares, schedule.ratios, strict=True))
        return abs((last if average is None else mean) - share)

    return min(range(len(published)), key=lambda i: off(published[i]))
