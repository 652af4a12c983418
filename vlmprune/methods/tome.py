"""ToMe, token merging (arXiv 2210.09461): merging inside the vision tower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from vlmprune.methods.base import ModelFacts, Tap, TowerMerging, register
from vlmprune.parts import BlockKeys, Clusters, Vision, match_alternating

__all__ = ["ToMe"]


@register("tome")
@dataclass(frozen=True)
class ToMe(TowerMerging):
    """Merge the most similar pairs of patches in every tower layer, by the cosine of their keys.

    Even tokens are matched with odd ones in the order that the matching before left, as in the released code
    (`match_alternating`). The same number is merged in every layer up to the feature layer.

    Args:
        keep, average: patches per image that enter the LLM (a fraction on families with views).
        place: "inside" the layer, between its attention and its feed-forward block (paper and code), or "behind" it (as
            adaptations to CLIP do, which work on whole layers).
        weigh: proportional attention: later layers count a token as often as the patches it stands for. Off as in
            adaptations to CLIP; ToMe's own code turns it on for its trained models.
    """

    summary = "similar patches merged in every tower layer"
    paper = "arXiv 2210.09461"

    place: Literal["inside", "behind"] = "inside"

    def matching(self, layer: int, facts: ModelFacts) -> tuple[Vision, Tap, Callable[..., Clusters]]:
        at = Vision(layer, inside=True) if self.place == "inside" else Vision(layer + 1)
        return at, BlockKeys(layer), match_alternating
