"""VTC-CLS (arXiv 2412.05819; code THU-MIG/VTC-CLS)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlmprune.methods.base import BeforeLLM, Layout, ModelFacts, Reduction, Seen, Tap, UnsupportedError, register
from vlmprune.parts import Ensemble, Scope, check_layer, ensemble_scores, need_cls, row_of, scale_tower_layer

__all__ = ["VtcCls"]


@register("vtc_cls")
@dataclass(frozen=True)
class VtcCls(BeforeLLM):
    """Keep the patches that the tower's [CLS] token looks at, summed over its last layers.

    The layers run from `start_layer` to the last but one; the last layer is never used (code: the slice `[start:-1]`).

    Args:
        start_layer: 0-based, negative from the end. Default 16 of 24 layers (the code's evaluation loaders), scaled;
            notes on the paper say 20.
        ensemble: "sum" (code), "mean" (same ranking), "max" or "min" (ablations).
        fallback: None refuses towers without a [CLS] token; "received" scores by the mean attention received from all
            patches over the same layers (in a tower with windows over those whose patches see all of the picture), a
            recognised stand-in that is not VTC-CLS.
        scope: "view" gives each view of an anyres image its share, "image" ranks all its patches together (the code
            knows single views only).
    """

    summary = "the patches that the tower's [CLS] token looks at"
    paper = "arXiv 2412.05819"
    needs = "tower attention, [CLS] token (or fallback='received')"
    looks_at = "tower"

    start_layer: int | None = None
    ensemble: Ensemble = "sum"
    fallback: Literal["received"] | None = None
    scope: Scope = "view"

    def see(self, facts: ModelFacts) -> tuple[Tap, ...]:
        if self.fallback is None:
            need_cls("vtc_cls", facts, "fallback='received' scores by attention received instead")
        layers = [layer for layer in self.layers(facts) if layer not in facts.windowed]
        if not layers:
            raise UnsupportedError(
                f"vtc_cls reads tower layers {self.layers(facts)[0]}..{facts.tower_layers - 2} here, in all of which a "
                f"patch sees its window alone: set start_layer to {facts.attention_layer} or less."
            )
        return tuple(row_of(facts, layer) for layer in layers)

    def layers(self, facts: ModelFacts) -> range:
        """The tower layers whose rows are combined."""
        last = facts.tower_layers - 1
        if self.start_layer is None:
            return range(scale_tower_layer(16, facts), last)
        start = check_layer("start_layer", self.start_layer, facts.tower_layers)
        if start >= last:
            raise ValueError(
                f"start_layer={self.start_layer} leaves no layer: the last one is never used, so at most {last - 1}."
            )
        return range(start, last)

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: one `(images, tokens)` row per layer in, decision out."""
        scores = ensemble_scores(list(seen.values()), self.ensemble)
        return self.best(scores, layout, scope=self.scope)
