"""ToMe (arXiv 2210.09461) and PiToMe (arXiv 2405.16148): merging tokens inside the vision tower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Annotated, Literal

import torch

from vlmprune.methods.base import AnyCut, Cut, Decoder, InTower, Layout, ModelFacts, Reduction, Seen, Tap, register
from vlmprune.parts import (
    BlockKeys,
    ClusterOf,
    Clusters,
    Hidden,
    TowerCut,
    Vision,
    first_of_cluster,
    layer_of,
    match_alternating,
    match_energy,
    spread_evenly,
)

__all__ = ["PiToMe", "ToMe"]


@dataclass(frozen=True)
class EncoderMerge(InTower):
    """What both methods share: merges in every layer up to the feature layer (23 of CLIP-L's 24, as in the sources)."""

    stage = "vision tower, every layer"
    needs = "the tower's keys or hidden states"
    looks_at = "features"

    weigh: bool = False

    def cuts(self, facts: ModelFacts) -> list[AnyCut]:
        layers, left = facts.feature_layer + 1, facts.view_patches
        cuts: list[AnyCut] = []
        for layer, removed in enumerate(self.schedule(left, self.left(facts), layers)):
            if removed > left // 2:
                raise ValueError(
                    f"{self.word}={self.budget} would merge {removed} of {left} tokens in one layer, at most half can "
                    f"go: raise {self.word} (this tower has {layers} layers to merge in)."
                )
            if removed:
                at, see, match = self.matching(layer, facts)
                match = partial(self.match, by=partial(match, removed=removed, has_cls=facts.has_cls))
                cuts.append(TowerCut(at, (see,), match, self.weigh))
            left -= removed
        return [*cuts, Cut(Decoder(0), (ClusterOf(),), partial(self.reduce, clusters=left), self.positions)]

    def schedule(self, patches: int, target: int, layers: int) -> list[int]:
        """Tokens to merge away in each layer, to get from `patches` to `target`."""
        return spread_evenly(patches - target, layers)

    def matching(self, layer: int, facts: ModelFacts) -> tuple[Vision, Tap, Callable[..., Clusters]]:
        """Where in tower layer `layer`, or at its end, it merges, by what, and how it is matched."""
        raise NotImplementedError

    def match(self, seen: Seen, sizes: torch.Tensor, by: Callable[[torch.Tensor], Clusters]) -> Clusters:
        """Pure: `(views, tokens, dim)` keys or hidden states in, clusters out."""
        (metric,) = seen.values()
        return by(metric)

    def reduce(self, seen: Seen, layout: Layout, clusters: int) -> Reduction:
        """Pure: cluster numbers in, one token per cluster stays."""
        (cluster,) = seen.values()
        return self.stays(first_of_cluster(cluster, layout), layout, clusters)


@register("tome")
@dataclass(frozen=True)
class ToMe(EncoderMerge):
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


@register("pitome")
@dataclass(frozen=True)
class PiToMe(EncoderMerge):
    """Merge patches that live in dense, redundant clusters (high energy) and protect the rest.

    Merging happens at a layer's end, as in the official CLIP patch. Every layer keeps the same share of its tokens
    (paper). The metric is the hidden state, the margin 0.9 - 0.9 l / L (code). Means are weighted by size (paper).

    Args:
        keep, average: patches per image that enter the LLM (a fraction on families with views).
        energy_from: first of 24 layers (scaled) whose tokens are chosen by energy; the official CLIP patch matches
            alternately in layers 0..12.
        weigh: as of ToMe; off in the official CLIP patch.
    """

    summary = "redundant patches merged in every tower layer, distinct ones protected"
    paper = "arXiv 2405.16148"

    energy_from: Annotated[int, layer_of(24, 0, 24)] = 13

    def schedule(self, patches: int, target: int, layers: int) -> list[int]:
        """The same share of what is left behind every layer, in whole tokens."""
        sizes = [round(patches * (target / patches) ** (layer / layers)) for layer in range(layers + 1)]
        return [before - after for before, after in pairwise(sizes)]

    def matching(self, layer: int, facts: ModelFacts) -> tuple[Vision, Tap, Callable[..., Clusters]]:
        by_energy = partial(match_energy, margin=0.9 - 0.9 * layer / facts.tower_layers)
        early = layer < round(self.energy_from * facts.tower_layers / 24)
        return Vision(layer + 1), Hidden(), match_alternating if early else by_energy
