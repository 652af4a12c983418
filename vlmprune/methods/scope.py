"""SCOPE (arXiv 2510.24214; code kinredon/SCOPE)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from vlmprune.methods.base import Pruner, register
from vlmprune.parts import (
    AnyNewlines,
    Cover,
    Cut,
    Decoder,
    Layout,
    ModelFacts,
    Must,
    Range,
    Reduction,
    Seen,
    candidates,
    features_of,
    is_number,
    row_of,
    select_covering,
)

__all__ = ["Scope"]


def positive(value: Any) -> bool:
    """Whether a value is a number of at least 0."""
    return is_number(value, most=float("inf"))


@register("scope")
@dataclass(frozen=True)
class Scope(Pruner):
    """Keep patches that [CLS] looks at and that stand for others: saliency times coverage.

    A patch's gain is how much better the patches of the image are covered once it is kept, each by the kept one it is
    most like (cosine of the tower's features; nothing is covered less than 0). Greedily the largest gain * saliency
    ** alpha is kept, where saliency is the attention of the [CLS] token in the layer whose output becomes the features.

    Args:
        keep, average: patches per image, or a fraction. The released code gives every tile int(keep / tiles); here all
            tiles of an image compete.
        alpha: power of the saliency (released scripts: 1); 0 is coverage alone.
        positions, newlines: contiguous, kept; the released code drops newlines with the un-padding.

    A tower without a [CLS] token is read by the attention that a patch receives from all others (ours).
    """

    summary = "patches that [CLS] looks at and that stand for others"
    paper = "arXiv 2510.24214"
    needs = "tower features and attention"
    looks_at = "features"

    alpha: Annotated[float, Must("a number of at least 0", positive), Range(0, 4)] = 1.0
    newlines: AnyNewlines = "all"

    def cuts(self, facts: ModelFacts) -> list[Cut]:
        return [Cut(Decoder(0), (features_of(facts), row_of(facts)), self.reduce, self.positions)]

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: features and one attention row in, decision out."""
        features, row = seen.values()
        among, _, _ = candidates(layout, self.newlines)
        covers = []
        for own, mine, grid in zip(features, among, layout.grids, strict=True):
            own, mine = own[: grid.tokens], mine[: grid.tokens]
            covers.append([Cover(own, own, mine, real=mine)])
        return select_covering(covers, self.budget, layout, self.newlines, weight=row**self.alpha)
