"""How many tokens stay: checking a user's `keep` and turning it into counts."""

from __future__ import annotations

import math
from numbers import Integral, Real

__all__ = ["check_keep", "count", "share"]


def check_keep(keep: int | float, name: str = "keep") -> int | float:
    """Return a budget as a plain int (tokens per image) or float (fraction of an image's tokens).

    Raises:
        TypeError: `keep` is not a number.
        ValueError: an int below 1, or a float outside (0, 1].
    """
    rule = f"{name} is an int of at least 1 (patches per image) or a float in (0, 1] (fraction of an image's patches)"
    if isinstance(keep, bool) or not isinstance(keep, Real):
        raise TypeError(f"{name}={keep!r} is not a number: {rule}.")
    if isinstance(keep, Integral):
        if keep < 1:
            raise ValueError(f"{name}={keep} keeps nothing: {rule}.")
        return int(keep)
    keep = float(keep)
    if math.isnan(keep) or not 0 < keep <= 1:
        hint = f" For {keep:g} tokens write {name}={int(keep)}." if keep > 1 and keep.is_integer() else ""
        raise ValueError(f"{name}={keep} is out of range: {rule}.{hint}")
    return keep


def count(keep: int | float, total: int) -> int:
    """Tokens kept of `total`: an int is capped at `total`, a float is floored with a minimum of 1 (0 of 0)."""
    if total == 0:
        return 0
    if isinstance(keep, int):
        return min(keep, total)
    return max(1, int(total * keep))


def share(keep: int | float, totals: list[int]) -> list[int]:
    """Split one image's budget over its views.

    A fraction applies to each view by itself (`count`). An int is the budget of the whole image and is split in
    proportion to the views' sizes by largest remainder, so that the parts add up to it.
    """
    if isinstance(keep, float):
        return [count(keep, total) for total in totals]
    whole = sum(totals)
    if keep >= whole:
        return list(totals)
    exact = [keep * total / whole for total in totals]
    parts = [int(e) for e in exact]
    for v in sorted(range(len(totals)), key=lambda v: (parts[v] - exact[v], v))[: keep - sum(parts)]:
        parts[v] += 1
    return parts
