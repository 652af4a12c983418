"""FoPru, focal pruning (arXiv 2411.14164)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from vlmprune.methods.base import Budgeted, check_layer, need_cls
from vlmprune.methods.vtc_cls import Ensemble, ensemble_scores
from vlmprune.parts.budget import count, share
from vlmprune.parts.cuts import Cut, Decoder, Positions, Reduction
from vlmprune.parts.facts import ModelFacts
from vlmprune.parts.layout import Layout
from vlmprune.parts.selection import Newlines, Scope, check_choice, keep_patches, select, top_k
from vlmprune.parts.taps import Tap, VisionAttention
from vlmprune.registry import register

__all__ = ["FoPru", "received_scores"]

Score = Literal["received", "cls"]


def received_scores(attention: torch.Tensor, score: str, has_cls: bool) -> torch.Tensor:
    """Significance of every patch from full attention maps.

    Args:
        attention: `(..., heads, tokens, tokens)`, post-softmax; the [CLS] token first where there is one.
        score: "cls", the [CLS] query's row, or "received", the mean over patch queries.

    Returns:
        `(..., patches)`.

    Raises:
        ValueError: another score, or "cls" without a [CLS] token.
    """
    check_choice("score", score, Score)
    if score == "cls" and not has_cls:
        raise ValueError("score='cls' needs the row of a [CLS] token: use 'received'.")
    mean, first = attention.mean(-3), int(has_cls)
    return mean[..., 0, first:] if score == "cls" else mean[..., first:, first:].mean(-2)


@register("fopru")
@dataclass(frozen=True)
class FoPru(Budgeted):
    """Keep the patches that the vision tower attends to most.

    No code was published: the paper's abstract fixes the two strategies and the restored order; the layer, the score
    and the rounding are our reading. We take the layer whose output becomes the visual features, and the mean attention
    a patch receives from all patches; `score="cls"` is the other reading.

    Args:
        keep, average: patches per image (as many as there are, or more, is the identity), or a fraction. `rank` keeps
            floor(n * keep) of a fraction, at least 1; `row` keeps whole rows, so the count is a multiple of a row and
            at least one row.
        strategy: "rank" (global top-k) or "row" (rows of the raster by mean score).
        score: "received" (any tower) or "cls" (towers with a [CLS] token).
        layer: 0-based tower layer, negative from the end, or several; default the feature layer.
        ensemble: how the scores of several layers become one: "mean", "sum" (same ranking), "max" or "min".
        scope: "view" gives each view of an anyres image its share, "image" ranks all its patches together; rows are
            always taken per plane (the thumbnail, and the stitched canvas of crops).
        positions: position ids after the cut; contiguous, as in code that embeds the kept tokens alone.
        newlines: what happens to newline tokens.
    """

    summary = "the patches that get most attention in the vision tower"
    paper = "arXiv 2411.14164"
    needs = "tower attention (one layer)"

    strategy: Literal["rank", "row"] = "rank"
    score: Score = "received"
    layer: int | tuple[int, ...] | None = None
    ensemble: Ensemble = "mean"
    scope: Scope = "view"
    positions: Positions = "contiguous"
    newlines: Newlines = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("strategy", self.strategy, Literal["rank", "row"])
        check_choice("score", self.score, Score)
        check_choice("ensemble", self.ensemble, Ensemble)
        check_choice("scope", self.scope, Scope)
        check_choice("positions", self.positions, Positions)
        check_choice("newlines", self.newlines, Literal["all", "row", "none"])
        if isinstance(self.layer, list):
            object.__setattr__(self, "layer", tuple(self.layer))

    def cuts(self, facts: ModelFacts) -> list[Cut]:
        if self.score == "cls":
            need_cls("fopru with score='cls'", facts, "use score='received'")
        rows = "cls" if self.score == "cls" else "patches"
        taps = tuple(VisionAttention(layer, rows) for layer in self.layers(facts))
        return [Cut(Decoder(0), taps, self.reduce, self.positions)]

    def layers(self, facts: ModelFacts) -> list[int]:
        """The tower layers that are read."""
        if self.layer is None:
            return [facts.feature_layer]
        given = self.layer if isinstance(self.layer, tuple) else (self.layer,)
        layers = [check_layer("layer", layer, facts.tower_layers) for layer in given]
        if not layers or len({*layers}) != len(layers):
            raise ValueError(f"layer={self.layer} must name at least one tower layer, and each of them once.")
        return layers

    def reduce(self, seen: dict[Tap, torch.Tensor], layout: Layout) -> Reduction:
        """Pure: `(images, tokens)` scores per layer in, decision out."""
        scores = ensemble_scores(list(seen.values()), self.ensemble)
        if self.strategy == "row":
            return self.rows(scores, layout)
        return select(scores, self.budget, layout, self.newlines, self.scope)

    def rows(self, scores: torch.Tensor, layout: Layout) -> Reduction:
        """Keep the best rows of every plane."""
        planes = max(len(grid.planes) for grid in layout.grids)
        tallest = max(rows for grid in layout.grids for rows, _ in grid.planes)
        counts = torch.tensor(
            [(n := rows_per_plane(self.budget, grid.planes)) + [0] * (planes - len(n)) for grid in layout.grids]
        )
        line = layout.plane * tallest + layout.row
        zeros = scores.new_zeros(len(layout), planes * tallest)
        patches = layout.patches.to(scores.dtype)
        mass = zeros.scatter_add(1, line, scores * patches).unflatten(1, (planes, tallest))
        size = zeros.scatter_add(1, line, patches).unflatten(1, (planes, tallest))
        best = top_k(mass / size.clamp(min=1), counts, size > 0).flatten(1)
        keep = best.gather(1, line) & layout.patches
        total = [
            sum(int(n) * cols for n, (_, cols) in zip(row, grid.planes, strict=False))
            for row, grid in zip(counts.tolist(), layout.grids, strict=True)
        ]
        whole = layout.alive_patches == [grid.patches for grid in layout.grids]
        return keep_patches(keep, layout, total if whole else None, self.newlines, scores)


def rows_per_plane(keep: int | float, planes: tuple[tuple[int, int], ...]) -> list[int]:
    """Whole rows of every plane that a budget pays for: at least one per plane of a fraction, one in all of a count."""
    if isinstance(keep, float):
        return [count(keep, rows) for rows, _ in planes]
    shares = share(keep, [rows * cols for rows, cols in planes])
    counts = [min(rows, part // cols) for part, (rows, cols) in zip(shares, planes, strict=True)]
    return counts if any(counts) else [1] + [0] * (len(planes) - 1)
