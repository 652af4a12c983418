"""SCOPE (arXiv 2510.24214; code kinredon/SCOPE)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from vlmprune.methods.base import AnyNewlines, BeforeLLM, Layout, ModelFacts, Reduction, Seen, Tap, register
from vlmprune.parts import Cover, Range, Weight, features_of, row_of, select_covering

__all__ = ["Scope"]


@register("scope")
@dataclass(frozen=True)
class Scope(BeforeLLM):
    """Keep patches that [CLS] looks at and that stand for others: saliency times coverage.

    A patch's gain is how much better the patches of the image are covered once it is kept, each by the kept one it is
    most like (cosine of the tower's features; nothing is covered less than 0). Greedily the largest gain * saliency
    ** alpha is kept; saliency is `row_of` the layer whose output becomes the features.

    Args:
        keep, average: of an image, whose tiles all compete; the released code gives every tile int(keep / tiles).
        alpha: power of the saliency (released scripts: 1); 0 is coverage alone.
    """

    summary = "patches that [CLS] looks at and that stand for others"
    paper = "arXiv 2510.24214"
    needs = "tower features and attention"
    looks_at = "features"

    alpha: Annotated[Weight, Range(0, 4)] = 1.0
    newlines: AnyNewlines = "all"

    def see(self, facts: ModelFacts) -> tuple[Tap, ...]:
        return features_of(facts), row_of(facts)

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: features and one attention row in, decision out."""
        features, row = seen.values()
        images = zip(features, self.among(layout), layout.grids, strict=True)
        covers = [[Cover.of_each_other(x[: grid.tokens], mine[: grid.tokens])] for x, mine, grid in images]
        return select_covering(covers, self.budget, layout, self.newlines, weight=row**self.alpha)
