"""Token-level correlation-guided compression (arXiv 2407.14439; no code was published): experimental."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

import torch
from torch.nn import functional

from vlmprune.methods.base import Pruner, register
from vlmprune.parts import (
    Cut,
    Decoder,
    Layout,
    Merge,
    ModelFacts,
    Must,
    Reduction,
    Seed,
    Seen,
    Share,
    TowerLayer,
    TowerTap,
    VisionAttention,
    WholeKeys,
    capped,
    count,
    gather_to,
    is_whole,
    keep_patches,
    need_cls,
    random_scores,
    scale_tower_layer,
    top_k,
    upcast,
    upload,
)

__all__ = ["Tcc", "density", "outlying"]


def outlying(row: torch.Tensor) -> torch.Tensor:
    """How far every score is above Q3 + 1.5 (Q3 - Q1) of its `(..., patches)` row: outliers are above 0."""
    low, high = torch.quantile(row, torch.tensor([0.25, 0.75], dtype=row.dtype, device=row.device), -1, keepdim=True)
    return row - (high + 1.5 * (high - low))


def density(keys: torch.Tensor, alike: float, doubles: int) -> torch.Tensor:
    """Share of the patches that have at most `doubles` others with a cosine above `alike`: `(views,)`.

    Args:
        keys: `(views, patches, dim)`.
    """
    unit = functional.normalize(upcast(keys), dim=-1)
    others = torch.cat([(part @ unit.transpose(-1, -2) > alike).sum(-1) - 1 for part in unit.split(256, 1)], 1)
    return (others <= doubles).float().mean(1)


@dataclass(frozen=True)
class Outlying(TowerTap):
    """`outlying` of the [CLS] row (or of what patches receive) in a tower layer, `(images, tokens)` float32."""

    rows: Literal["cls", "patches"] = "cls"

    def measure(self, layer: TowerLayer, hidden: torch.Tensor, has_cls: bool) -> torch.Tensor:
        return outlying(VisionAttention(self.layer, self.rows).measure(layer, hidden, has_cls))


@dataclass(frozen=True)
class Density(TowerTap):
    """`density` of the view that a patch is in, by the keys of a tower layer, `(images, tokens)` float32."""

    alike: float = 0.0
    doubles: int = 0

    def measure(self, layer: TowerLayer, hidden: torch.Tensor, has_cls: bool) -> torch.Tensor:
        keys = WholeKeys(self.layer).measure(layer, hidden, has_cls)
        return density(keys, self.alike, self.doubles)[:, None].expand(-1, keys.shape[1])


@register("tcc")
@dataclass(frozen=True)
class Tcc(Pruner):
    """Keep outliers of a deep [CLS] row and a sample whose size follows how much of a view repeats: experimental.

    Of every view the outliers above Q3 + 1.5 IQR stay, and of its patches a share as large as that of patches without
    doubles (by shallow keys), drawn without replacement by their shallow [CLS] attention. What goes is averaged into
    the kept patch whose shallow key is most like its own. An image's thumbnail stays whole.

    No claim of reproduction: the paper's thresholds are not public, its code never was, its numbers contradict each
    other. Layers, `alike` and `doubles` are ours.

    Args:
        keep, average: None lets the picture decide how many stay; a budget takes outliers first, then the drawn
            patches in the order of their draw, from the thumbnail too.
        shallow, deep: tower layers of 24, scaled.
        alike, doubles: a patch repeats if more than `doubles` others have a cosine above `alike`.
        seed: of the drawing.
        fallback: None refuses towers without a [CLS] token; "received" reads the attention that patches receive.
        positions, newlines: as everywhere.
    """

    summary = "outliers of a [CLS] row and a sample as large as little repeats (experimental)"
    paper = "arXiv 2407.14439"
    needs = "tower attention and keys, [CLS] token (or fallback='received')"
    looks_at = "tower"
    syncs = 1
    optional = True

    shallow: Annotated[int, Must("a layer from 0 to 23 (of 24, scaled)", partial(is_whole, most=23))] = 3
    deep: Annotated[int, Must("a layer from 0 to 23 (of 24, scaled)", partial(is_whole, most=23))] = 22
    alike: Share = 0.9
    doubles: Annotated[int, Must("a whole number of at least 0", is_whole)] = 8
    seed: Seed = 0
    fallback: Literal["received"] | None = None

    def cuts(self, facts: ModelFacts) -> list[Cut]:
        if self.fallback is None:
            need_cls("tcc", facts, "fallback='received' scores by attention received instead")
        rows = "cls" if facts.has_cls else "patches"
        shallow, deep = (scale_tower_layer(layer, facts) for layer in (self.shallow, self.deep))
        see = (
            Outlying(deep, rows),
            Density(shallow, self.alike, self.doubles),
            VisionAttention(shallow, rows),
            WholeKeys(shallow),
        )
        return [Cut(Decoder(0), see, self.reduce, self.positions)]

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: outliers, densities, shallow attention and keys in, decision out."""
        above, dense, row, keys = seen.values()
        patches = layout.patches
        draw = random_scores(self.seed, layout).clamp(1e-7, 1 - 1e-7)
        order = row.clamp(min=1e-12).log() - (-draw.log()).log()  # the largest are a draw by `row`
        if self.budget is None:
            keep, counts = patches & (above > 0), None
            for view in range(max(grid.views for grid in layout.grids)):
                mine = patches & (layout.view == view)
                number = (torch.where(mine, dense, 0).sum(1) + 1e-4).floor().long()
                keep = keep | top_k(order, number.clamp(min=1), mine)
            several = upload([len(g.planes) > 1 and not g.frames for g in layout.grids], keep.device)[:, None]
            keep = keep | (patches & several & (layout.plane == 0))
        else:
            counts = [count(self.budget, grid.patches) for grid in layout.grids]
            rank = order.sigmoid().to(row) + 2 * (above > 0)
            keep, counts = top_k(rank, counts, patches), capped(counts, layout.alive_patches)
        into, flows = gather_to(keys, patches & ~keep, keep)
        size = torch.zeros_like(row).scatter_add(1, into, (flows | keep).to(row)).clamp(min=1)
        weight = torch.where(flows | keep, 1 / size.gather(1, into), (layout.alive & layout.newline).to(row))
        return replace(keep_patches(keep, layout, counts, self.newlines, order), merge=Merge(into, weight))
