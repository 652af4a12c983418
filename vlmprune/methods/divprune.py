"""DivPrune (arXiv 2503.02175; code vbdi/divprune)."""

from __future__ import annotations

from dataclasses import dataclass

from vlmprune.methods.base import Pruner, register
from vlmprune.parts import AnyNewlines, Cut, Decoder, Hidden, Layout, ModelFacts, Reduction, Seen, select_diverse

__all__ = ["DivPrune"]


@register("divprune")
@dataclass(frozen=True)
class DivPrune(Pruner):
    """Keep the patches whose nearest kept neighbour is farthest: max-min diversity of the projected features.

    The first pick is the patch whose nearest other patch is farthest; each later one is farthest from all picks, by
    cosine distance in float32.

    Args:
        keep, average: patches per image, or a fraction. The official default is 0.098 of the tokens, rounded to the
            nearest number; fractions are floored here as everywhere (`keep=56` is the published count of 576).
        positions: the family's own; contiguous, as the official code (it cuts before positions are made).
        newlines: what happens to newline tokens. The official code lets them compete with the patches of an anyres
            image ("candidates"), which its published numbers for LLaVA-1.5 do not depend on; they are kept by default.
    """

    summary = "patches that differ most from each other"
    paper = "arXiv 2503.02175"
    needs = "features"
    looks_at = "features"

    newlines: AnyNewlines = "all"

    def cuts(self, facts: ModelFacts) -> list[Cut]:
        return [Cut(Decoder(0), (Hidden(),), self.reduce, self.positions)]

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: features in, decision out."""
        return select_diverse(seen[Hidden()], None, self.budget, layout, self.newlines, "max_min")
