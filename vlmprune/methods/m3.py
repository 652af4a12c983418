"""Matryoshka Multimodal Models, M3 (arXiv 2405.17430; code mu-cai/matryoshka-mm)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from vlmprune.methods.base import Pruner, register
from vlmprune.parts import (
    Cut,
    Decoder,
    Layout,
    Merge,
    ModelFacts,
    Reduction,
    Seen,
    UnsupportedError,
    keep_patches,
    laid_out,
    nested_cells,
)

__all__ = ["M3"]


@register("m3")
@dataclass(frozen=True)
class M3(Pruner):
    """Average the patches of every view in nested squares, as M3's checkpoints were trained to be read.

    A view of 24 x 24 patches has the scales 576, 144, 36, 9 and 1; other views are divided by the prime factors of
    their side, the smallest first. Checkpoints of M3 are LLaVA checkpoints: load one as any other and ask for one of
    its scales. With weights that were not trained for it this is plain pooling, a weak baseline.

    Args:
        keep, average: at most so many patches per image, or a fraction: all views get the finest scale that it pays
            for, and the coarsest where it pays for none (tables show the real count).
        positions: contiguous (code).
        newlines: kept.

    A square stands at the place of its first patch. Where un-padding cut a square, what is left of it is averaged.
    """

    summary = "average pooling in nested squares, as M3 checkpoints were trained for"
    paper = "arXiv 2405.17430"
    looks_at = "nothing"

    def cuts(self, facts: ModelFacts) -> list[Cut]:
        return [Cut(Decoder(0), (), self.reduce, self.positions)]

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: the layout in, decision out."""
        if layout.alive_patches != [grid.patches for grid in layout.grids]:
            raise UnsupportedError("m3 averages whole squares, and an earlier cut has taken patches: put m3 first.")
        cells = partial(nested_cells, keep=self.budget)
        anchor, into, weight, counts = laid_out(layout, cells, ("m3", self.budget))
        return replace(keep_patches(anchor, layout, counts, self.newlines), merge=Merge(into, weight))
