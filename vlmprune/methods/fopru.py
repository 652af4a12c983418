"""FoPru, focal pruning (arXiv 2411.14164)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlmprune.methods.base import BeforeLLM, Layout, ModelFacts, Reduction, Seen, Tap, register
from vlmprune.parts import Ensemble, Scope, VisionAttention, check_layer, ensemble_scores, need_cls, select_rows

__all__ = ["FoPru"]


@register("fopru")
@dataclass(frozen=True)
class FoPru(BeforeLLM):
    """Keep the patches that the vision tower attends to most.

    No code was published: the paper's abstract fixes the two strategies and the restored order; the layer, the score
    and the rounding are our reading.

    Args:
        keep, average: `rank` keeps floor(n * keep) of a fraction, at least 1; `row` keeps whole rows, at least one.
        strategy: "rank" (global top-k) or "row" (rows of the raster by mean score).
        score: "received", the mean attention from all patches (any tower), or "cls" (towers with a [CLS] token).
        layer: 0-based tower layer, negative from the end, or several; default the feature layer, in a tower with
            windows the last one up to it whose patches see all of the picture.
        ensemble: how the scores of several layers become one: "mean", "sum" (same ranking), "max" or "min".
        scope: "view" gives each view of an anyres image its share, "image" ranks all its patches together; rows are
            always taken per plane (the thumbnail, and the stitched canvas of crops).
    """

    summary = "the patches that get most attention in the vision tower"
    paper = "arXiv 2411.14164"
    needs = "tower attention (one layer)"
    looks_at = "tower"

    strategy: Literal["rank", "row"] = "rank"
    score: Literal["received", "cls"] = "received"
    layer: int | tuple[int, ...] | None = None
    ensemble: Ensemble = "mean"
    scope: Scope = "view"

    def see(self, facts: ModelFacts) -> tuple[Tap, ...]:
        if self.score == "cls":
            need_cls("fopru with score='cls'", facts, "use score='received'")
        rows = "cls" if self.score == "cls" else "patches"
        return tuple(VisionAttention(layer, rows) for layer in self.layers(facts))

    def layers(self, facts: ModelFacts) -> list[int]:
        """The tower layers that are read."""
        if self.layer is None:
            return [facts.attention_layer]
        given = self.layer if isinstance(self.layer, tuple) else (self.layer,)
        layers = [check_layer("layer", layer, facts.tower_layers) for layer in given]
        if not layers or len({*layers}) != len(layers):
            raise ValueError(f"layer={self.layer} must name at least one tower layer, and each of them once.")
        return layers

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: `(images, tokens)` scores per layer in, decision out."""
        scores = ensemble_scores(list(seen.values()), self.ensemble)
        if self.strategy == "row":
            return select_rows(scores, self.budget, layout, self.newlines)
        return self.best(scores, layout, scope=self.scope)
