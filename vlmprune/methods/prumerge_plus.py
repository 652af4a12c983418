"""LLaVA-PruMerge+ (arXiv 2403.15388; code 42Shawn/LLaVA-PruMerge)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmprune.methods.base import register
from vlmprune.methods.prumerge import PruMerge
from vlmprune.parts import top_k

__all__ = ["PruMergePlus"]


@register("prumerge_plus")
@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge with patches from all over the picture: every n-th stays too, n a third of the patches per outlier.

    The released code stops with an error where there is no outlier, or more than a third are; here the step is at least
    one patch, and a view without an outlier keeps the token for the rest alone.

    Args:
        keep, average: None lets the picture say. Else a fourth goes by attention and the others are spread evenly
            (ours: without a budget there are about three for each outlier).
        neighbours: as of PruMerge.
    """

    summary = "outliers of [CLS] attention and evenly spread patches, with their neighbours merged in"

    def free(self, row: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        strong = super().free(row, present)
        number, place, total = strong.sum(1, keepdim=True), present.cumsum(1) - 1, present.sum(1, keepdim=True)
        step = (total // number.clamp(min=1) // 3).clamp(min=1)
        return strong | (present & (place % step == 0) & (place < total - 1) & (number > 0))

    def fixed(self, row: torch.Tensor, counts: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        strong = top_k(row, -(-counts // 4), present)
        rest = present & ~strong
        left, total = (counts - strong.sum(1))[:, None], rest.sum(1, keepdim=True).clamp(min=1)
        place = rest.cumsum(1) - 1
        # the first patch of every one of `left` equal stretches
        first = (place * left // total > (place - 1) * left // total) | (place == 0)
        return strong | (rest & first & (left > 0))
