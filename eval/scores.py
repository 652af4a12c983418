"""How right an answer is, by the answers that were given for it: 0 to 1."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

__all__ = ["METRICS", "score"]

ANLS = 0.5  # similarity below which an answer counts as wrong (Biten et al., ICCV 2019)


def plain(text: str) -> str:
    """In small letters, without signs and with single spaces."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.casefold()).split())


def distance(a: str, b: str) -> int:
    """Levenshtein's: letters to insert, delete or exchange."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def exact(said: str, wanted: str) -> float:
    """The same, but for capitals, signs and spaces."""
    return float(plain(said) == plain(wanted))


def contains(said: str, wanted: str) -> float:
    """The wanted words stand in what was said, one after the other."""
    return float(f" {plain(wanted)} " in f" {plain(said)} ")


def anls(said: str, wanted: str) -> float:
    """Normalised Levenshtein similarity, 0 under a half."""
    a, b = plain(said), plain(wanted)
    near = 1 - distance(a, b) / max(len(a), len(b), 1)
    return near if near >= ANLS else 0.0


def choice(said: str, wanted: str) -> float:
    """The first letter that stands alone (`B`, `(b)`, `B.`) is the wanted one."""
    found = re.search(r"\b([A-Za-z])\b", said)
    return float(found is not None and found[1].casefold() == plain(wanted))


METRICS: dict[str, Callable[[str, str], float]] = {
    "exact": exact,
    "contains": contains,
    "anls": anls,
    "choice": choice,
}


def score(metric: str, said: str, wanted: Sequence[str]) -> float:
    """The best over all answers that count as right."""
    return max(METRICS[metric](said, one) for one in wanted)
