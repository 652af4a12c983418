"""VisPruner (arXiv 2412.01818; code Theia-4869/VisPruner)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from vlmprune.methods.base import BeforeLLM, Layout, ModelFacts, Reduction, Seen, Tap, register
from vlmprune.parts import Share, dedupe, features_of, floored, row_of, select_each

__all__ = ["VisPruner"]


@register("vispruner")
@dataclass(frozen=True)
class VisPruner(BeforeLLM):
    """Keep the patches that [CLS] looks at most, and of the others those that are no duplicates.

    The important share of the budget goes by `row_of` the layer whose output becomes the features. From the rest, in
    the order of that attention, near duplicates (by the tower's features) are taken out by `dedupe` until the other
    share is left. The released code stops with an error where an odd number is left to thin out.

    Args:
        important_ratio: the important share (code: 0.5), floored. 1 is FasterVLM, which has a name of its own.
    """

    summary = "patches that [CLS] looks at, and others that are no duplicates"
    paper = "arXiv 2412.01818"
    needs = "tower attention and features"
    looks_at = "tower"

    important_ratio: Share = 0.5

    def see(self, facts: ModelFacts) -> tuple[Tap, ...]:
        return (row_of(facts), features_of(facts))[: 1 + (self.important_ratio < 1)]

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: one attention row and features in, decision out."""
        row, *features = seen.values()

        def choose(image: int, order: torch.Tensor, kept: int) -> torch.Tensor:
            strong = floored(kept * self.important_ratio)
            chosen = torch.arange(len(order), device=order.device) < strong
            if strong == kept:
                return chosen
            unit = normalize(features[0][image, order[strong:]].float(), dim=-1)
            return chosen.index_fill(0, strong + dedupe(unit, kept - strong), True)

        return select_each(row, self.budget, layout, self.newlines, choose)
