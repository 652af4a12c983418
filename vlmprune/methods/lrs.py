"""The training-free form of LRS-VQA's coarse-to-fine choice of tiles (arXiv 2503.07588; code VisionXLab/LRS-VQA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from vlmprune.methods.base import Cut, Decoder, Layout, ModelFacts, Pruner, Reduction, Seen, register
from vlmprune.parts import ImageGrid, Share, TextAttention, count, decoder_cuts, layer_of, need_crops, top_k, upload

__all__ = ["Lrs", "tile_of"]


def tile_of(grid: ImageGrid) -> torch.Tensor:
    """Of every patch of a thumbnail the view of the crop that shows its place: `(rows, cols)` long."""
    (rows, cols), (down, across) = grid.side, grid.crops
    row, col = torch.arange(rows) * down // rows, torch.arange(cols) * across // cols
    return 1 + row[:, None] * across + col


@register("lrs")
@dataclass(frozen=True)
class Lrs(Pruner):
    """Let what the question looks at in the thumbnail choose the crops that stay, and what it looks at in those.

    LRS-VQA trains a module to choose which tiles of a large picture are encoded at all. This is the form without
    training that nobody has published: attention of a decoder layer stands in for the module. All crops are encoded.

    Args:
        keep, average: left from the cut on: of the thumbnail first, then of chosen crops, then of others, each by their
            attention.
        coarse: share of the thumbnail's patches that choose crops: every crop that shows one of the best (code: 0.25).
        layer: 1-based, of a 32-layer decoder, behind which tokens go (inferred; scaled with depth).
        positions, newlines: contiguous, kept (code).
    """

    summary = "crops that show what the question looks at in the thumbnail (training-free form, unpublished)"
    paper = "arXiv 2503.07588"
    needs = "a family with views; decoder attention (one layer)"
    looks_at = "decoder"
    stage = "decoder layer 8 of 32"
    refuses_inputs: ClassVar[dict[str, str]] = {
        "video": "lets the thumbnail of an image choose its crops, and a video has no thumbnail",
        "single": "lets the thumbnail of an image choose its crops, and this one has none: give pictures that are cut "
        "into crops, or take another method",
    }

    coarse: Share = 0.25
    layer: Annotated[int, layer_of(32, 1, 31)] = 8

    def cuts(self, facts: ModelFacts) -> list[Cut]:
        need_crops("lrs", facts, "chooses")
        (layer,) = decoder_cuts("layer", (self.layer,), facts.decoder_layers)
        return [Cut(Decoder(layer), (TextAttention(layer - 1, "last"),), self.reduce, self.positions)]

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: `(images, tokens)` attention in, decision out."""
        (attention,) = seen.values()
        level = torch.zeros_like(attention)
        for i, grid in enumerate(layout.grids):
            patches, view = layout.patches[i], layout.view[i]
            small = patches & (view == 0)
            best = top_k(attention[i], count(float(self.coarse), grid.patches_per_view[0]), small)
            row, col = (x[i].clamp(max=n - 1) for x, n in zip((layout.row, layout.col), grid.side, strict=True))
            tile = upload(tile_of(grid), view.device)[row, col]
            chosen = torch.zeros(grid.views, device=view.device).index_add(0, torch.where(best, tile, 0), best.float())
            level[i] = torch.where(small, 2.0, (chosen[view] > 0).to(level))
        # attention is at most 1: a level counts for more than any
        return self.best(attention + 2 * level, layout)
