"""VTC-CLS (arXiv 2412.05819; code THU-MIG/VTC-CLS)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from vlmprune.methods.base import Budgeted, check_layer, need_cls, tower_layer
from vlmprune.parts.cuts import Cut, Decoder, Positions, Reduction
from vlmprune.parts.facts import ModelFacts
from vlmprune.parts.layout import Layout
from vlmprune.parts.selection import Newlines, Scope, check_choice, select
from vlmprune.parts.taps import Tap, VisionAttention
from vlmprune.registry import register

__all__ = ["Ensemble", "VtcCls", "ensemble_scores"]

Ensemble = Literal["sum", "mean", "max", "min"]


def ensemble_scores(rows: list[torch.Tensor], ensemble: Ensemble = "sum") -> torch.Tensor:
    """Combine the rows of several layers (head-mean), each `(..., patches)`, into one score."""
    stack = torch.stack(rows)
    return getattr(stack, {"max": "amax", "min": "amin"}.get(ensemble, ensemble))(0)


@register("vtc_cls")
@dataclass(frozen=True)
class VtcCls(Budgeted):
    """Keep the patches that the tower's [CLS] token looks at, summed over its last layers.

    The layers run from `start_layer` to the last but one; the last layer is never used (code: the slice `[start:-1]`).

    Args:
        keep, average: patches per image, or a fraction.
        start_layer: 0-based, negative from the end. The evaluation loaders of the official code default to 16 of 24
            layers, which is the default here, scaled to the tower's depth; notes on the paper say 20 (three layers).
        ensemble: "sum" (code), "mean" (same ranking), "max" or "min" (ablations).
        fallback: None refuses towers without a [CLS] token; "received" scores by the mean attention received from all
            patches over the same layers, a recognised stand-in that is not VTC-CLS.
        scope: "view" gives each view of an anyres image its share (patches are split by largest remainder, so that the
            budget is met), "image" ranks all its patches together (the official code knows single views only).
        positions: contiguous, as the official code (its prepare step drops the original ids).
        newlines: what happens to newline tokens.
    """

    summary = "the patches that the tower's [CLS] token looks at"
    paper = "arXiv 2412.05819"
    needs = "tower attention, [CLS] token (or fallback='received')"

    start_layer: int | None = None
    ensemble: Ensemble = "sum"
    fallback: Literal["received"] | None = None
    scope: Scope = "view"
    positions: Positions = "contiguous"
    newlines: Newlines = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("ensemble", self.ensemble, Ensemble)
        check_choice("fallback", self.fallback, Literal["received", None])
        check_choice("scope", self.scope, Scope)
        check_choice("positions", self.positions, Positions)
        check_choice("newlines", self.newlines, Literal["all", "row", "none"])

    def layers(self, facts: ModelFacts) -> range:
        """The tower layers whose rows are combined."""
        last = facts.tower_layers - 1
        if self.start_layer is None:
            return range(tower_layer(16, facts), last)
        start = check_layer("start_layer", self.start_layer, facts.tower_layers)
        if start >= last:
            raise ValueError(
                f"start_layer={self.start_layer} leaves no layer: the last one is never used, so at most {last - 1}."
            )
        return range(start, last)

    def cuts(self, facts: ModelFacts) -> list[Cut]:
        if self.fallback is None:
            need_cls("vtc_cls", facts, "fallback='received' scores by attention received instead")
        rows = "cls" if facts.has_cls else "patches"
        taps = tuple(VisionAttention(layer, rows) for layer in self.layers(facts))
        return [Cut(Decoder(0), taps, self.reduce, self.positions)]

    def reduce(self, seen: dict[Tap, torch.Tensor], layout: Layout) -> Reduction:
        """Pure: one `(images, tokens)` row per layer in, decision out."""
        scores = ensemble_scores(list(seen.values()), self.ensemble)
        return select(scores, self.budget, layout, self.newlines, self.scope)
