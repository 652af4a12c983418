"""DivPrune (arXiv 2503.02175; code vbdi/divprune)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmprune.methods.base import Budgeted
from vlmprune.parts.budget import count
from vlmprune.parts.cuts import Cut, Decoder, Positions, Reduction
from vlmprune.parts.diversity import greedy_diversity, most_apart
from vlmprune.parts.facts import ModelFacts
from vlmprune.parts.layout import Layout
from vlmprune.parts.selection import Newlines, candidates, capped, check_choice, keep_patches
from vlmprune.parts.taps import Hidden, Tap
from vlmprune.registry import register

__all__ = ["DivPrune"]


@register("divprune")
@dataclass(frozen=True)
class DivPrune(Budgeted):
    """Keep the patches whose nearest kept neighbour is farthest: max-min diversity of the projected features.

    The first pick is the patch whose nearest other patch is farthest; each later one is farthest from all picks, by
    cosine distance in float32.

    Args:
        keep, average: patches per image, or a fraction. The official default is 0.098 of the tokens, rounded to the
            nearest number; fractions are floored here as everywhere (`keep=56` is the published count of 576).
        positions: contiguous, as the official code (it cuts the embeddings before positions are made).
        newlines: what happens to newline tokens. The official code lets them compete with the patches of an anyres
            image ("candidates"), which its published numbers for LLaVA-1.5 do not depend on; they are kept by default.
    """

    summary = "patches that differ most from each other"
    paper = "arXiv 2503.02175"
    needs = "features"

    positions: Positions = "contiguous"
    newlines: Newlines = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("positions", self.positions, Positions)
        check_choice("newlines", self.newlines, Newlines)

    def cuts(self, facts: ModelFacts) -> list[Cut]:
        return [Cut(Decoder(0), (Hidden(),), self.reduce, self.positions)]

    def reduce(self, seen: dict[Tap, torch.Tensor], layout: Layout) -> Reduction:
        """Pure: features in, decision out."""
        features = seen[Hidden()]
        among, totals, available = candidates(layout, self.newlines)
        counts = [count(self.budget, total) for total in totals]
        keep, _ = greedy_diversity(features, most_apart(features, among), counts, among, "max_min")
        return keep_patches(keep & among, layout, capped(counts, available), self.newlines)
