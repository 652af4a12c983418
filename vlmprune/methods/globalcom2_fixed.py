"""GlobalCom² (arXiv 2501.05179) with a count that is known before a picture is seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmprune.methods.base import Layout, Reduction, Seen, register
from vlmprune.methods.globalcom2 import Commanded

__all__ = ["GlobalCom2Fixed"]


@register("globalcom2_fixed")
@dataclass(frozen=True)
class GlobalCom2Fixed(Commanded):
    """GlobalCom² with a count that is known beforehand: its choice, topped up to the budget (not in the paper).

    A patch whose place among its view's patches, best first, is p (from 1) lies p - q beyond the share q of its view.
    The source keeps those that lie beyond by nothing, so as many as its floors leave; this as many as the budget says,
    those that lie beyond by least.

    Args:
        keep, average, tau, score: as of `globalcom2`; exactly so many patches stay of every image.
    """

    summary = "globalcom2 with exactly the budget's number of patches, so that it can be served"

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: `(images, tokens)` scores in, decision out."""
        (scores,) = seen.values()
        inside = torch.zeros_like(scores, dtype=torch.float32)
        for i, grid in enumerate(layout.grids):
            local, member, quota = self.shares(scores[i, : grid.tokens], grid)
            order = local.masked_fill(~member, -torch.inf).argsort(dim=-1, descending=True, stable=True)
            beyond = order.argsort(dim=-1) + 1 - quota[:, None]
            inside[i, : grid.tokens] = -torch.where(member, beyond, 0).sum(0)
        return self.best(inside, layout, self.share)
