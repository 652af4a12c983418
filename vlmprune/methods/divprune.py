"""DivPrune (arXiv 2503.02175; code vbdi/divprune)."""

from __future__ import annotations

from dataclasses import dataclass

from vlmprune.methods.base import AnyNewlines, BeforeLLM, Layout, Reduction, Seen, register
from vlmprune.parts import Hidden, select_diverse

__all__ = ["DivPrune"]


@register("divprune")
@dataclass(frozen=True)
class DivPrune(BeforeLLM):
    """Keep the patches whose nearest kept neighbour is farthest: max-min diversity of the projected features.

    The first pick is the patch whose nearest other patch is farthest; each later one is farthest from all picks, by
    cosine distance in float32.

    Args:
        keep, average: official default: 0.098 of the tokens, rounded to the nearest number; fractions are floored here
            as everywhere (`keep=56` is the published count of 576).
        newlines: the official code lets them compete ("candidates"); they are kept by default.
    """

    summary = "patches that differ most from each other"
    paper = "arXiv 2503.02175"
    needs = "features"
    looks_at = "features"
    sees = (Hidden(),)

    newlines: AnyNewlines = "all"

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: features in, decision out."""
        return select_diverse(seen[Hidden()], None, self.budget, layout, self.newlines, "max_min")
