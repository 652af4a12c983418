"""How many tokens stay: checking a user's `keep` and turning it into counts.

One rule for all fractions, here and in every method: amounts are floored, a hair (1e-9) above what floats make of them,
so that 0.7 of 2880 is 2016 though `2880 * 0.7` is 2015.9999999999998.
"""

from __future__ import annotations

from numbers import Integral, Real

__all__ = ["HAIR", "SmallBudgetWarning", "check_keep", "count", "floored", "share", "unlikely"]

HAIR = 1e-9
#: Counts under this are rarely meant: 1 is one patch, and 1.0 all of them.
SMALL = 4


class SmallBudgetWarning(UserWarning):
    """A count of so few patches that a fraction may have been meant; given where a method is built."""


def unlikely(keep: object, name: str = "keep") -> str:
    """What to say about a count below 4; empty for any other budget."""
    if not isinstance(keep, int) or keep >= SMALL:
        return ""
    patches, whole = ("one patch", f"; {name}=1.0 is all of them") if keep == 1 else (f"{keep} patches", "")
    return f"{name}={keep} is a count: {patches} per image{whole}. A fraction is a float in (0, 1]."


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
    if not 0 < keep <= 1:  # NaN too
        hint = f" For {keep:g} tokens write {name}={int(keep)}." if keep > 1 and keep.is_integer() else ""
        raise ValueError(f"{name}={keep} is out of range: {rule}.{hint}")
    return keep


def floored(amount: float) -> int:
    """The whole part of an amount that a fraction made, a hair above what floats make of it."""
    return int(amount + HAIR)


def count(keep: int | float, total: int) -> int:
    """Tokens kept of `total`: an int is capped at `total`, a float is floored with a minimum of 1 (0 of 0)."""
    if total == 0:
        return 0
    if isinstance(keep, int):
        return min(keep, total)
    return max(1, floored(total * keep))


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
    parts = [keep * total // whole for total in totals]
    lost = [keep * total % whole for total in totals]
    for v in sorted(range(len(totals)), key=lambda v: (-lost[v], v))[: keep - sum(parts)]:
        parts[v] += 1
    return parts
