"""Token-level correlation-guided compression (arXiv 2407.14439; no code was published): experimental."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from vlmprune.methods.base import BeforeLLM, Layout, ModelFacts, Reduction, Seen, Tap, register
from vlmprune.parts import (
    Density,
    Outlying,
    Seed,
    Share,
    VisionAttention,
    Whole,
    WholeKeys,
    capped,
    count,
    layer_of,
    nearest_mean,
    need_cls,
    random_scores,
    scale_tower_layer,
    top_k,
    upload,
)

__all__ = ["Tcc"]


@register("tcc")
@dataclass(frozen=True)
class Tcc(BeforeLLM):
    """Keep outliers of a deep [CLS] row and a sample whose size follows how much of a view repeats: experimental.

    Of every view the outliers above Q3 + 1.5 IQR stay, and of its patches a share as large as that of patches without
    doubles (by shallow keys), drawn without replacement by their shallow [CLS] attention. What goes is averaged into
    the kept patch whose shallow key is most like its own. An image's thumbnail stays whole. No claim of reproduction:
    the paper's thresholds are not public; layers, `alike` and `doubles` are ours.

    Args:
        keep, average: None lets the picture decide how many stay; a budget takes outliers first, then the drawn
            patches in the order of their draw, from the thumbnail too.
        shallow, deep: tower layers of 24, scaled.
        alike, doubles: a patch repeats if more than `doubles` others have a cosine above `alike`.
        seed: of the drawing.
        fallback: None refuses towers without a [CLS] token; "received" reads the attention that patches receive.
    """

    summary = "outliers of a [CLS] row and a sample as large as little repeats (experimental)"
    paper = "arXiv 2407.14439"
    needs = "tower attention and keys, [CLS] token (or fallback='received')"
    looks_at = "tower"
    syncs = 1
    optional = True

    shallow: Annotated[int, layer_of(24, 0, 23)] = 3
    deep: Annotated[int, layer_of(24, 0, 23)] = 22
    alike: Share = 0.9
    doubles: Whole = 8
    seed: Seed = 0
    fallback: Literal["received"] | None = None

    def see(self, facts: ModelFacts) -> tuple[Tap, ...]:
        if self.fallback is None:
            need_cls("tcc", facts, "fallback='received' scores by attention received instead")
        rows = "cls" if facts.has_cls else "patches"
        shallow, deep = (scale_tower_layer(layer, facts) for layer in (self.shallow, self.deep))
        dense = Density(shallow, self.alike, self.doubles)
        return Outlying(deep, rows), dense, VisionAttention(shallow, rows), WholeKeys(shallow)

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: outliers, densities, shallow attention and keys in, decision out."""
        above, dense, row, keys = seen.values()
        patches = layout.patches
        draw = random_scores(self.seed, layout).clamp(1e-7, 1 - 1e-7)
        order = row.clamp(min=1e-12).log() - (-draw.log()).log()  # the largest are a draw by `row`
        if self.budget is None:
            keep, reached = patches & (above > 0), None
            for view in range(max(grid.views for grid in layout.grids)):
                mine = patches & (layout.view == view)
                number = (torch.where(mine, dense, 0).sum(1) + 1e-4).floor().long()
                keep = keep | top_k(order, number.clamp(min=1), mine)
            several = upload([len(g.planes) > 1 and not g.frames for g in layout.grids], keep.device)[:, None]
            keep = keep | (patches & several & (layout.plane == 0))
        else:
            counts = [count(self.budget, grid.patches) for grid in layout.grids]
            rank = order.sigmoid().to(row) + 2 * (above > 0)
            keep, reached = top_k(rank, counts, patches), capped(counts, layout.alive_patches)
        return self.kept(keep, layout, reached, order, nearest_mean(keys, keep, patches))
