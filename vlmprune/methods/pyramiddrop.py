"""PyramidDrop (arXiv 2410.17247; code Cooperx521/PyramidDrop)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmprune.methods.base import AnyNewlines, Layout, ModelFacts, Seen, Staged, Tap, register
from vlmprune.parts import TextAttention

__all__ = ["PyramidDrop"]


@register("pyramiddrop")
@dataclass(frozen=True)
class PyramidDrop(Staged):
    """Halve the visual tokens at every quarter of the decoder, by what the last prompt token attends to.

    Each cut ranks by the attention that the layer behind it is about to pay (head mean, that layer's own norm, queries
    and keys), of the prompt's last token, which the source calls the last instruction token.

    Args:
        keep, average: None runs the published schedule (an average of 270 of 576), which a budget stretches.
        prune_layers, keep_ratios: behind layers 8, 16, 24 of 32 (scaled) 0.5, 0.25, 0.125, floored (code).
        positions: contiguous, re-indexed at every cut (code).
        newlines: "candidates" (code: all tokens of the image compete), or a rule for them.
    """

    summary = "what the last prompt token looks at, half as many after each quarter of the decoder"
    paper = "arXiv 2410.17247"
    looks_at = "decoder"
    needs = "decoder attention (three layers)"
    stage = "decoder layers 8, 16, 24 of 32"

    newlines: AnyNewlines = "candidates"

    def see(self, layer: int, facts: ModelFacts) -> tuple[Tap, ...]:
        return (TextAttention(layer, "last"),)

    def score(self, seen: Seen, layout: Layout) -> torch.Tensor:
        """Pure: attention as it is."""
        (attention,) = seen.values()
        return attention
