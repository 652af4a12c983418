"""LLaVA-PruMerge and PruMerge+ (arXiv 2403.15388; code 42Shawn/LLaVA-PruMerge)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from vlmprune.methods.base import BehindTower, register
from vlmprune.parts import (
    AnyCut,
    ModelFacts,
    Must,
    Pick,
    Seen,
    Views,
    WholeKeys,
    WholeRow,
    is_whole,
    top_k,
    upload,
)

__all__ = ["PruMerge", "PruMergePlus", "outliers", "spread_over", "sums"]


def outliers(row: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """`(views,)` long: patches whose attention is above the third quartile by 1.5 times the interquartile range."""
    kept = row.masked_fill(~present, torch.nan)
    low, high = (torch.nanquantile(kept, q, dim=1, keepdim=True) for q in (0.25, 0.75))
    return ((row > high + 1.5 * (high - low)) & present).sum(1)


def spread_over(strong: torch.Tensor, number: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Every n-th patch of a view besides the strong ones, n a third of the patches that there are for each of those.

    Args:
        strong, present: `(views, patches)` bool; number: `(views,)` long.
    """
    place, total = present.cumsum(1) - 1, present.sum(1, keepdim=True)
    step = (total // number[:, None].clamp(min=1) // 3).clamp(min=1)
    return present & ~strong & (place % step == 0) & (place < total - 1) & (number > 0)[:, None]


def sums(row: torch.Tensor, keys: torch.Tensor, keep: torch.Tensor, present: torch.Tensor, near: int) -> torch.Tensor:
    """The matrix by which every patch becomes itself and the `near` patches of most similar keys, by their attention.

    Args:
        row: `(views, patches)` attention; keys: `(views, patches, dim)`; keep, present: `(views, patches)` bool.

    Returns:
        `(views, patches + 1, patches)`, whose last row sums up what is not kept.
    """
    unit = torch.nn.functional.normalize(keys, dim=-1)
    cosine = unit @ unit.transpose(1, 2)
    eye = torch.eye(cosine.shape[1], dtype=torch.bool, device=row.device)
    others = (present[:, None] & ~eye).expand_as(cosine)
    count = torch.full(cosine.shape[:2], near, device=row.device)
    mine = top_k(cosine, count, others) * row[:, None] + eye
    return torch.cat((mine, ((present & ~keep) * row)[:, None]), 1)


@register("prumerge")
@dataclass(frozen=True)
class PruMerge(BehindTower):
    """Keep patches that [CLS] looks at far more than at others, and merge what is like them into them.

    How many stay hangs on the picture: those whose attention lies above the third quartile by 1.5 times the
    interquartile range. Each becomes itself plus its 32 neighbours by keys, each times its attention; one token more
    sums up all that goes. Attention is that of the last layer, over its full width without heads.

    Args:
        keep, average: None lets the picture say. Else patches per image, or a fraction, by the best attention, as other
            papers' tables have it; the token for the rest counts as one.
        neighbours: by keys, of all other patches (code: 32).
        positions, newlines: as everywhere. Tokens stand at the places of their patches, the one for the rest at the
            first place that nothing else takes; the released code orders them by attention.

    Kept tokens are sums, not means: neighbours' weights are attention as it is. At `keep=1.0` nothing is done. A
    tower without a [CLS] token is read by the attention that a patch receives (ours).
    """

    summary = "outliers of [CLS] attention, with their neighbours merged in; the picture says how many"
    paper = "arXiv 2403.15388"
    needs = "tower attention and keys (last layer)"
    looks_at = "tower"
    syncs = 1
    optional = True

    neighbours: Annotated[int, Must("a whole number of at least 0", is_whole)] = 32

    spreads: ClassVar[bool] = False  # whether patches from all over the picture stay too

    def cuts(self, facts: ModelFacts) -> list[AnyCut]:
        last = facts.tower_layers - 1
        return self.behind(WholeRow(last), WholeKeys(last))

    def merge(self, seen: Seen, views: Views) -> Pick:
        """Pure: one attention row and the keys of every view in, what anchors become out."""
        row, keys = seen.values()
        present = upload(views.present, row.device)
        total = present.sum(1)
        if self.keep is None and self.average is None:
            number = outliers(row, present)
            strong = top_k(row, number, present)
            keep = strong | spread_over(strong, number, present) if self.spreads else strong
            whole = torch.zeros_like(total, dtype=torch.bool)
        else:
            shares = upload(views.shares(self.budget), row.device)
            whole = shares >= total
            keep = self.fixed(row, (shares - 1).clamp(min=0), present) | (present & whole[:, None])
        matrix = sums(row, keys, keep, present, self.neighbours)
        # the token for the rest stands where nothing else is left
        rest = present & ~keep
        place = rest.long().argmax(1, keepdim=True)
        anchors = keep.scatter(1, place, keep.gather(1, place) | rest.any(1, keepdim=True))
        matrix = matrix[:, :-1].scatter(1, place[..., None].expand(-1, -1, row.shape[1]), matrix[:, -1:])
        plain = torch.eye(row.shape[1], dtype=matrix.dtype, device=row.device)
        return Pick(anchors, mix=torch.where((anchors & rest.any(1, keepdim=True))[..., None], matrix, plain))

    def fixed(self, row: torch.Tensor, counts: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """`(views, patches)` bool, so many patches of every view."""
        return top_k(row, counts, present)


@register("prumerge_plus")
@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge with patches from all over the picture: every n-th stays too, n a third of the patches per outlier.

    Args:
        keep, average: None lets the picture say. Else patches per image, or a fraction, of which a fourth go by
            attention and the others are spread evenly (ours: without a budget there are about three for each outlier).
        neighbours, positions, newlines: as of PruMerge.

    The released code stops with an error where there is no outlier, or more than a third are; here the step is at least
    one patch, and a view without an outlier keeps the token for the rest alone.
    """

    summary = "outliers of [CLS] attention and evenly spread patches, with their neighbours merged in"

    spreads: ClassVar[bool] = True

    def fixed(self, row: torch.Tensor, counts: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        strong = top_k(row, -(-counts // 4), present)
        rest = present & ~strong
        left, total = counts - strong.sum(1), rest.sum(1)
        place = rest.cumsum(1) - 1
        # the first patch of every one of `left` equal stretches
        stretch = place * left[:, None] // total.clamp(min=1)[:, None]
        before = (place - 1) * left[:, None] // total.clamp(min=1)[:, None]
        return strong | (rest & ((stretch > before) | (place == 0)) & (left > 0)[:, None])
