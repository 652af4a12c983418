"""TransPrune (arXiv 2507.20630; code liaolea/TransPrune)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch

from vlmprune.methods.base import AnyNewlines, Layout, ModelFacts, Seen, Staged, Tap, register
from vlmprune.parts import Layers, Ratios, Share, TextAttention, Transition, TransitionMode, ascending, schedule_layers

__all__ = ["TransPrune", "accumulated"]


def accumulated(layers: tuple[int, ...], prune: tuple[int, ...], depth: int) -> list[int]:
    """Scale 1-based layers to accumulate over, of a 32-layer decoder, so that they follow the scaled cuts.

    A layer behind which tokens are cut becomes that cut's layer, any other one max(1, round(l * depth / 32)). Layers
    without a gap stay so: all from the first scaled one to the last.
    """
    cut = dict(zip(prune, schedule_layers(prune, depth), strict=True))
    scaled = sorted({cut.get(layer, max(1, round(layer * depth / 32))) for layer in layers})
    whole = layers[-1] - layers[0] + 1 == len(layers)
    return list(range(scaled[0], scaled[-1] + 1)) if whole else scaled


@register("transprune")
@dataclass(frozen=True)
class TransPrune(Staged):
    """Keep the tokens that the middle layers change most and that the instruction looks at, in three steps.

    After layers 7, 9 and 12 of 32 (scaled with depth): the accumulated `Transition` of layers 7..12 so far, plus the
    attention the next layer's instruction rows pay to each token.

    Args:
        keep, average: None runs the published "High" schedule, which a budget stretches.
        mode: "official", what the released code computes (1 - cos, softmax over the whole sequence, both scores
            rescaled to sum 1), or "paper" (1 - |cos|, softmax over the image, raw sum with alpha).
        accumulate_layers, prune_layers: 1-based, of a 32-layer decoder; all layers from the first cut to the last one
            are accumulated if none are given (7 to 12, as the source). At another depth both scale (`accumulated`).
        keep_ratios: floored, but never fewer than 1 of an image that has tokens (code: 0 is possible).
        alpha: weight of the transition score; the official code has none, which is 0.5.
        positions: contiguous, re-indexed at every cut (source).
        newlines: "candidates" (source: all tokens of the image compete).
    """

    summary = "the tokens that middle layers change most and the instruction looks at, in three steps"
    paper = "arXiv 2507.20630"
    needs = "decoder blocks' inputs and outputs, decoder attention (three layers)"
    looks_at = "decoder"
    stage = "decoder layers 7, 9, 12 of 32"

    mode: TransitionMode = "official"
    accumulate_layers: Annotated[tuple[int, ...] | None, ascending(32)] = None
    prune_layers: Layers = (7, 9, 12)
    keep_ratios: Ratios = (0.875, 0.625, 0.125)
    alpha: Share = 0.5
    newlines: AnyNewlines = "candidates"

    def __post_init__(self) -> None:
        super().__post_init__()
        first, last = self.prune_layers[0], self.prune_layers[-1]
        if self.accumulate_layers is None:
            object.__setattr__(self, "accumulate_layers", tuple(range(first, last + 1)))
        if self.accumulate_layers[0] > first or self.accumulate_layers[-1] > last:
            raise ValueError(
                f"accumulate_layers={self.accumulate_layers} must start by the first cut, after layer {first}, and end "
                f"by the last one, after layer {last}: what comes later is never read."
            )

    def see(self, layer: int, facts: ModelFacts) -> tuple[Tap, ...]:
        # layers count from 1: "after layer p" is the input of layer p counted from 0, whose attention decides
        watched = accumulated(self.accumulate_layers, self.prune_layers, facts.decoder_layers)
        taps = tuple(Transition(number - 1, self.mode) for number in watched if number <= layer)
        return (*taps, TextAttention(layer, "instruction"))

    def score(self, seen: Seen, layout: Layout) -> torch.Tensor:
        """Pure: transitions of the layers so far and attention in; the code first divides both by their sums."""
        *changes, attention = seen.values()
        change = torch.stack(changes).sum(0)
        if self.mode == "official":
            among = self.among(layout)
            change, attention = (
                x / (torch.where(among, x, 0).sum(-1, keepdim=True) + 1e-8) for x in (change, attention)
            )
        return self.alpha * change + (1 - self.alpha) * attention
