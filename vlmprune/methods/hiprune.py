"""HiPrune (arXiv 2508.00553; code Danielement321/HiPrune)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from vlmprune.methods.base import BeforeLLM, Layout, ModelFacts, Reduction, Seen, Tap, register
from vlmprune.parts import Share, by_view, layer_of, neighbours, row_of, scale_tower_layer, top_k, upload

__all__ = ["HiPrune"]


@register("hiprune")
@dataclass(frozen=True)
class HiPrune(BeforeLLM):
    """Keep objects as a middle layer of the tower sees them, with their surroundings, and what a deep layer looks at.

    Anchors are the patches that get most attention in a middle layer, from all tokens, [CLS] included; with them stay
    their four neighbours. The rest of the budget goes to the patches that get most attention in the layer whose output
    becomes the features. Views share the budget in proportion to their patches.

    Args:
        alpha: anchors and neighbours are about this share of the budget, round(budget * alpha / 5) anchors (code: 0.1).
        object_layer: 1-based layer of 24 (scaled) of the anchors (code: 9).
        parity: None takes neighbours on the picture's own grid, across the seams of crops and not around its edges.
            "released" counts numbers (+-1, +-24) within a view, so that its rows wrap.
    """

    summary = "objects of a middle tower layer with their neighbours, then what a deep layer looks at"
    paper = "arXiv 2508.00553"
    needs = "tower attention (two layers)"
    looks_at = "tower"

    alpha: Share = 0.1
    object_layer: Annotated[int, layer_of(24, 1, 24)] = 9
    parity: Literal["released"] | None = None

    def see(self, facts: ModelFacts) -> tuple[Tap, ...]:
        layers = scale_tower_layer(self.object_layer - 1, facts), facts.feature_layer
        return tuple(row_of(facts, layer, "all") for layer in layers)

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: `(images, tokens)` attention received in a middle and a deep layer in, decision out."""
        shallow, deep = (*seen.values(), *seen.values())[:2]  # in a tiny tower they are one layer
        views, shares, counts = by_view(layout, self.budget)
        shares = upload(shares, deep.device)
        anchors = (shares * (self.alpha / 5)).round().long()
        strong = top_k(shallow[:, None].expand_as(views), anchors, views).any(1)
        near = neighbours(strong, layout, self.parity == "released")
        score = (deep + 2.0 * (strong | near) + 2.0 * strong)[:, None].expand_as(views)  # attention is at most 1
        kept = top_k(score, shares, views).any(1)
        return self.kept(kept, layout, counts, deep)
