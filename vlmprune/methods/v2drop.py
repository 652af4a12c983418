"""V2Drop (arXiv 2509.01552; code xuyang-liu16/V2Drop)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch

from vlmprune.methods.base import Layout, ModelFacts, Positions, Seen, Staged, Tap, register
from vlmprune.parts import Hidden, Inputs, Layers, falling, upcast

__all__ = ["V2Drop"]


@register("v2drop")
@dataclass(frozen=True)
class V2Drop(Staged):
    """Drop the visual tokens that a decoder layer hardly changes: neither attention nor the question is looked at.

    A token's score is the length of what the layer before the cut added to it (L2).

    Args:
        keep, average: None runs the released schedule (an average of 203 of 576), which a budget stretches.
        prune_layers: 1-based, of a 32-layer decoder, scaled (code: the inputs of layers 3, 17 and 22 counted from 0).
        keep_ratios: of the tokens that entered the LLM; 0 is the single token that the code leaves.
        positions: original (code).
        newlines: kept; the code knows single views.
    """

    summary = "the tokens that decoder layers change most, in three steps"
    paper = "arXiv 2509.01552"
    looks_at = "decoder"
    needs = "decoder states"
    stage = "decoder layers 3, 17, 22 of 32"

    prune_layers: Layers = (3, 17, 22)
    keep_ratios: Annotated[tuple[float, ...], falling(0)] = (0.5, 0.25, 0.0)
    positions: Positions = "original"

    def see(self, layer: int, facts: ModelFacts) -> tuple[Tap, ...]:
        return Inputs(layer - 1), Hidden()

    def score(self, seen: Seen, layout: Layout) -> torch.Tensor:
        """Pure: `(images, tokens, dim)` states before and after a layer in, how far it moved each out."""
        before, after = seen.values()
        return (upcast(after) - upcast(before)).norm(dim=-1)
