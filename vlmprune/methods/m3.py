"""Matryoshka Multimodal Models, M3 (arXiv 2405.17430; code mu-cai/matryoshka-mm)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from vlmprune.methods.base import BeforeLLM, Layout, Merge, Reduction, Seen, register
from vlmprune.parts import laid_out, nested_cells

__all__ = ["M3"]


@register("m3")
@dataclass(frozen=True)
class M3(BeforeLLM):
    """Average the patches of every view in nested squares, as M3's checkpoints were trained to be read.

    A view of 24 x 24 patches has the scales 576, 144, 36, 9 and 1; others are divided by the prime factors of their
    side, the smallest first. A square stands at the place of its first patch. Checkpoints of M3 are LLaVA checkpoints;
    with other weights this is plain pooling.

    Args:
        keep, average: at most so many patches per image, or a fraction: all views get the finest scale that it pays
            for, and the coarsest where it pays for none (tables show the real count).
    """

    summary = "average pooling in nested squares, as M3 checkpoints were trained for"
    paper = "arXiv 2405.17430"
    looks_at = "nothing"

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: the layout in, decision out."""
        layout.need_whole("m3", "averages whole squares")
        cells = partial(nested_cells, keep=self.budget)
        anchor, into, weight, counts = laid_out(layout, cells, ("m3", self.budget))
        return self.kept(anchor, layout, counts, merge=Merge(into, weight))
