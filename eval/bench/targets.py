"""What this project promises about CPU speed, and whether results keep it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["PAIRS", "Verdict", "judge", "judge_selection"]

PAIRS = 15  # fewer paired ratios prove nothing
BEFORE_LLM, IN_DECODER, DROP, TOKEN, SELECTION = 1.05, 1.10, 0.03, 1.02, 2.0


@dataclass(frozen=True)
class Verdict:
    """One target for one cell: `ratio` is a median with its 95 % interval and the number of pairs."""

    who: str
    what: str
    limit: float
    ratio: dict[str, float]
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the median meets the target and there were enough pairs."""
        value = self.ratio["median"]
        within = value >= self.limit if self.at_least else value <= self.limit
        return within and self.ratio["pairs"] >= PAIRS


def judge(results: dict[str, Any]) -> Iterator[Verdict]:
    """The targets of every cell.

    A cut inside the decoder allows more overhead over its own oracle; what taps, selection and gathering cost of the
    unpruned first token is promised for methods that cut before the language model.
    """
    for cell in results["cells"]:
        deep = any(part["first_layer"] > 0 for part in cell["stretches"])
        who = f"{cell['method']} {cell['budget']} of {cell['tokens']['visual']}"
        yield Verdict(who, "first token / oracle", IN_DECODER if deep else BEFORE_LLM, cell["overhead"])
        if not deep:
            yield Verdict(who, "taps + selection + gather", DROP, cell["cost_share"])
        if "decode_overhead" in cell:
            yield Verdict(who, "token / oracle's token", TOKEN, cell["decode_overhead"])


def judge_selection(found: list[dict[str, Any]]) -> Iterator[Verdict]:
    """The target of greedy selection alone."""
    for one in found:
        who = f"{one['objective']} {one['tokens']} -> {one['keep']}"
        yield Verdict(who, "published loop / ours", SELECTION, one["speedup"], at_least=True)
