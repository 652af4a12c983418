"""LLaVA-PruMerge (arXiv 2403.15388; code 42Shawn/LLaVA-PruMerge)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmprune.methods.base import AnyCut, BehindTower, ModelFacts, Pick, Seen, register
from vlmprune.parts import Views, Whole, WholeKeys, WholeRow, outlying, top_k, upload

__all__ = ["PruMerge"]


@register("prumerge")
@dataclass(frozen=True)
class PruMerge(BehindTower):
    """Keep patches that [CLS] looks at far more than at others, and merge what is like them into them.

    How many stay hangs on the picture: those whose attention is `outlying`. Each becomes itself plus its 32 neighbours
    by keys, each times its attention (a sum, no mean); one token more sums up all that goes, at the first place that
    nothing else takes. Attention is that of the last layer, over its full width without heads.

    Args:
        keep, average: None lets the picture say. Else by the best attention, as other papers' tables have it; the token
            for the rest counts as one.
        neighbours: by keys, of all other patches (code: 32).
    """

    summary = "outliers of [CLS] attention, with their neighbours merged in; the picture says how many"
    paper = "arXiv 2403.15388"
    needs = "tower attention and keys (last layer)"
    looks_at = "tower"
    syncs = 1
    optional = True

    neighbours: Whole = 32

    def cuts(self, facts: ModelFacts) -> list[AnyCut]:
        last = facts.tower_layers - 1
        return self.behind(WholeRow(last), WholeKeys(last))

    def merge(self, seen: Seen, views: Views) -> Pick:
        """Pure: one attention row and the keys of every view in, what anchors become out."""
        row, keys = seen.values()
        present = upload(views.present, row.device)
        if self.keep is None and self.average is None:
            keep = self.free(row, present)
        else:
            shares = upload(views.shares(self.budget), row.device)
            whole = shares >= present.sum(1)
            keep = self.fixed(row, (shares - 1).clamp(min=0), present) | (present & whole[:, None])
        matrix, rest = self.with_neighbours(row, keys, present), present & ~keep
        # the token for the rest stands where nothing else is left
        place = rest.long().argmax(1, keepdim=True)
        anchors = keep.scatter(1, place, keep.gather(1, place) | rest.any(1, keepdim=True))
        matrix = matrix.scatter(1, place[..., None].expand(-1, -1, row.shape[1]), (rest * row)[:, None])
        plain = torch.eye(row.shape[1], dtype=matrix.dtype, device=row.device)
        return Pick(anchors, mix=torch.where((anchors & rest.any(1, keepdim=True))[..., None], matrix, plain))

    def free(self, row: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """`(views, patches)` bool, as many as the picture says."""
        return top_k(row, (outlying(row.masked_fill(~present, torch.nan)) > 0).sum(1), present)

    def fixed(self, row: torch.Tensor, counts: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """`(views, patches)` bool, so many patches of every view."""
        return top_k(row, counts, present)

    def with_neighbours(self, row: torch.Tensor, keys: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """`(views, patches, patches)`, by which a patch becomes itself and its neighbours, times their attention."""
        unit = torch.nn.functional.normalize(keys, dim=-1)
        cosine = unit @ unit.transpose(1, 2)
        eye = torch.eye(cosine.shape[1], dtype=torch.bool, device=row.device)
        number = torch.full(cosine.shape[:2], self.neighbours, device=row.device)
        return top_k(cosine, number, (present[:, None] & ~eye).expand_as(cosine)) * row[:, None] + eye
