"""Successive halving: many candidates on few pictures, few on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["FINALISTS", "Standing", "better_half", "rungs"]

FINALISTS = 4
FEWEST = 8  # pictures of the first rung, where there are as many


@dataclass(frozen=True)
class Standing:
    """How a candidate stands.

    Attributes:
        label: its name.
        speedup: against the unpruned model.
        loss: mean so far.
        hopeless: whether its loss is over the limit for sure.
    """

    label: str
    speedup: float
    loss: float
    hopeless: bool = False


def rungs(pictures: int, candidates: int) -> list[int]:
    """Pictures of every rung, the last one all: doubled while the candidates are halved down to the finalists."""
    made = [pictures]
    while candidates > FINALISTS and made[0] // 2 >= FEWEST:
        made.insert(0, made[0] // 2)
        candidates = -(-candidates // 2)
    return made


def better_half(standings: Sequence[Standing], speedup: float) -> list[str]:
    """The labels that go on: without the hopeless ones, half of the rest, at least the finalists.

    Those that are fast enough come first, by their loss; of the others the faster ones.
    """
    left = [one for one in standings if not one.hopeless]
    order = sorted(left, key=lambda one: (one.speedup < speedup, one.loss if one.speedup >= speedup else -one.speedup))
    return [one.label for one in order[: max(FINALISTS, -(-len(left) // 2))]]
