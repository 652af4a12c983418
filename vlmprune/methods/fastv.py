"""FastV (arXiv 2403.06764; code pkunlp-icler/FastV)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from vlmprune.budget import check_keep
from vlmprune.cuts import Cut, Decoder, Positions, Reduction
from vlmprune.layout import Layout
from vlmprune.methods.base import Method, check_layer
from vlmprune.patches import ModelFacts
from vlmprune.registry import register
from vlmprune.selection import Newlines, check_choice, select
from vlmprune.taps import Tap, TextAttention

__all__ = ["FastV"]


@register("fastv")
@dataclass(frozen=True)
class FastV(Method):
    """Keep the visual tokens that the last prompt token attends to in an early decoder layer.

    The attention of layer K - 1 (head mean) decides what enters layer K; system and text tokens always stay.

    Args:
        keep: visual tokens per image left from layer K on, or a fraction; the code's default removes half.
        layer: K, 0-based (code default 2; the demo uses 3). Not scaled with depth.
        rows: "last", the last prompt token's row (all released code), or "all", the mean over every row (the paper's
            description).
        positions: original (code: `position_ids` are indexed with what is kept).
        newlines: "candidates" (code: newline tokens compete like patches), or a rule for them.
    """

    summary = "the tokens that the last prompt token attends to in decoder layer K - 1"
    paper = "arXiv 2403.06764"
    needs = "decoder attention (one layer)"
    stage = "decoder layer K"

    keep: int | float = 0.5
    layer: int = 2
    rows: Literal["last", "all"] = "last"
    positions: Positions = "original"
    newlines: Newlines = "candidates"

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", check_keep(self.keep))
        check_choice("rows", self.rows, Literal["last", "all"])
        check_choice("positions", self.positions, Positions)
        check_choice("newlines", self.newlines, Newlines)

    def cuts(self, facts: ModelFacts) -> list[Cut]:
        layer = check_layer("layer", self.layer, facts.decoder_layers, lowest=1)
        return [Cut(Decoder(layer), (TextAttention(layer - 1, self.rows),), self.reduce, self.positions)]

    def reduce(self, seen: dict[Tap, torch.Tensor], layout: Layout) -> Reduction:
        """Pure: `(images, tokens)` attention in, decision out."""
        (scores,) = seen.values()
        return select(scores, self.keep, layout, self.newlines)
