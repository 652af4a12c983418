"""VisPruner (arXiv 2412.01818; code Theia-4869/VisPruner), and FasterVLM, its first version."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from vlmprune.methods.base import BeforeLLM, Layout, ModelFacts, Reduction, Seen, Tap, register
from vlmprune.parts import Share, features_of, floored, row_of, select_each

__all__ = ["FasterVLM", "VisPruner", "dedupe"]


def dedupe(unit: torch.Tensor, target: int, step: int = 8) -> torch.Tensor:
    """Drop near duplicates until `target` tokens are left.

    In rounds: tokens at even places are compared with those at odd ones, and up to `step` even ones that are most like
    an odd one go. What is left of the even ones, by falling likeness, and the odd ones are the next round's order.

    Args:
        unit: `(tokens, dim)` of length 1, in the order of the first round.

    Returns:
        `(target,)` long, in the order of the last round.
    """
    cosine, left = unit @ unit.T, torch.arange(len(unit), device=unit.device)
    while len(left) > max(target, 0):
        even, odd = left[::2], left[1::2]
        if not len(odd):
            return left[:target]
        # not a stable sort: so the released code orders what float32 cannot tell apart
        alike = cosine[even][:, odd].amax(1).argsort(descending=True)
        left = torch.cat((even[alike[min(step, len(left) - target) :]], odd))
    return left


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


@register("fastervlm")
@dataclass(frozen=True)
class FasterVLM(VisPruner):
    """Keep the patches that [CLS] looks at most: the first version of VisPruner, which is it with important_ratio=1.

    Args:
        important_ratio: as of VisPruner; less than 1 is VisPruner.
    """

    summary = "the patches that [CLS] looks at in one layer (VisPruner, important_ratio=1)"
    paper = "arXiv 2412.01818v1"
    needs = "tower attention"

    important_ratio: Share = 1.0
