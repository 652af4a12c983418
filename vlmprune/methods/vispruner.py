"""VisPruner (arXiv 2412.01818; code Theia-4869/VisPruner), and FasterVLM, its first version."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmprune.methods.base import Pruner, register
from vlmprune.parts import (
    Cut,
    Decoder,
    Layout,
    ModelFacts,
    Reduction,
    Seen,
    Share,
    candidates,
    capped,
    count,
    download,
    features_of,
    floored,
    keep_patches,
    row_of,
)

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
class VisPruner(Pruner):
    """Keep the patches that [CLS] looks at most, and of the others those that are no duplicates.

    The important share of the budget goes by the attention of the [CLS] token in the layer whose output becomes the
    features. From the rest, in the order of that attention, near duplicates are taken out round by round (`dedupe`)
    until the other share is left; features are the tower's.

    Args:
        keep, average: patches per image, or a fraction.
        important_ratio: the important share (code: 0.5), floored. 1 is FasterVLM, which has a name of its own.
        positions, newlines: as everywhere; the paper's LLaVA-NeXT has a fixed grid of tiles without un-padding.

    The released code stops with an error where an odd number is left to thin out; here the split is the true one, of
    which its even cases are part. A tower without a [CLS] token is read by the attention that a patch receives.
    """

    summary = "patches that [CLS] looks at, and others that are no duplicates"
    paper = "arXiv 2412.01818"
    needs = "tower attention and features"
    looks_at = "tower"

    important_ratio: Share = 0.5

    def cuts(self, facts: ModelFacts) -> list[Cut]:
        see = (row_of(facts), features_of(facts))
        return [Cut(Decoder(0), see[: 1 + (self.important_ratio < 1)], self.reduce, self.positions)]

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: one attention row and features in, decision out."""
        row, *features = seen.values()
        among, totals, available = candidates(layout, self.newlines)
        there = download(among.sum(1)) if available is None else available
        counts = capped([count(self.budget, total) for total in totals], there)
        mask = torch.zeros_like(among)
        for i, (kept, alive) in enumerate(zip(counts, there, strict=True)):
            order = row[i].masked_fill(~among[i], -torch.inf).sort(descending=True, stable=True).indices[:alive]
            strong = floored(kept * self.important_ratio)
            chosen, rest = order[:strong], order[strong:]
            if strong < kept:
                unit = torch.nn.functional.normalize(features[0][i, rest].float(), dim=-1)
                rest = rest[dedupe(unit, kept - strong)]
                chosen = torch.cat((chosen, rest))
            mask[i] = mask[i].index_fill(0, chosen, True)
        return keep_patches(mask, layout, counts, self.newlines, row)


@register("fastervlm")
@dataclass(frozen=True)
class FasterVLM(VisPruner):
    """Keep the patches that [CLS] looks at most: the first version of VisPruner, which is it with important_ratio=1.

    Args:
        keep, average: patches per image, or a fraction.
        important_ratio: as of VisPruner; less than 1 is VisPruner.
        positions, newlines: as everywhere.
    """

    summary = "the patches that [CLS] looks at in one layer (VisPruner, important_ratio=1)"
    paper = "arXiv 2412.01818v1"
    needs = "tower attention"

    important_ratio: Share = 1.0
