"""ToMe (arXiv 2210.09461) and PiToMe (arXiv 2405.16148): merging tokens inside the vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Annotated, Literal

import torch

from vlmprune.methods.base import AnyCut, Cut, Decoder, InTower, Layout, ModelFacts, Reduction, Seen, register
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
    """What both methods share: a schedule of merges in the tower's layers, and one token per cluster afterwards.

    Every layer up to the feature layer merges, 23 of CLIP-L's 24 as in the sources.
    """

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
                cuts.append(self.cut(layer, removed, facts))
            left -= removed
        return [*cuts, Cut(Decoder(0), (ClusterOf(),), partial(self.reduce, clusters=left), self.positions)]

    def schedule(self, patches: int, target: int, layers: int) -> list[int]:
        """Tokens to merge away in each layer, to get from `patches` to `target`."""
        return spread_evenly(patches - target, layers)

    def cut(self, layer: int, removed: int, facts: ModelFacts) -> TowerCut:
        """The cut in tower layer `layer`, or at its end."""
        raise NotImplementedError

    def alternating(self, seen: Seen, sizes: torch.Tensor, removed: int, has_cls: bool) -> Clusters:
        """Pure: `(views, tokens, dim)` keys or hidden states in, clusters out."""
        (metric,) = seen.values()
        return match_alternating(metric, removed, has_cls)

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

    def cut(self, layer: int, removed: int, facts: ModelFacts) -> TowerCut:
        at = Vision(layer, inside=True) if self.place == "inside" else Vision(layer + 1)
        reduce = partial(self.alternating, removed=removed, has_cls=facts.has_cls)
        return TowerCut(at, (BlockKeys(layer),), reduce, weigh=self.weigh)


@register("pitome")
@dataclass(frozen=True)
class PiToMe(EncoderMerge):
    """Merge patches that live in dense, redundant clusters (high energy) and protect the rest.

    Merging happens at a layer's end, as in the official CLIP patch. Every layer keeps the same share of its tokens
    (paper). The metric is the hidden state, the margin 0.9 - 0.9 l / L (code). Means are weighted by size as in the
    paper; the CLIP patch takes plain ones. The order of the tokens is the code's, as ToMe's.

    Args:
        keep, average: patches per image that enter the LLM (a fraction on families with views).
        energy_from: first of 24 layers (scaled) whose tokens are chosen by energy; the official CLIP patch matches
            alternately in layers 0..12.
        weigh: proportional attention; off in the official CLIP patch.
    """

    summary = "redundant patches merged in every tower layer, distinct ones protected"
    paper = "arXiv 2405.16148"

    energy_from: Annotated[int, layer_of(24, 0, 24)] = 13

    def schedule(self, patches: int, target: int, layers: int) -> list[int]:
        """The same share of what is left behind every layer, in whole tokens."""
        sizes = [round(patches * (target / patches) ** (layer / layers)) for layer in range(layers + 1)]
        return [before - after for before, after in pairwise(sizes)]

    def cut(self, layer: int, removed: int, facts: ModelFacts) -> TowerCut:
        reduce = self.alternating
        if layer >= round(self.energy_from * facts.tower_layers / 24):
            reduce = partial(self.by_energy, margin=0.9 - 0.9 * layer / facts.tower_layers)
        reduce = partial(reduce, removed=removed, has_cls=facts.has_cls)
        return TowerCut(Vision(layer + 1), (Hidden(),), reduce, weigh=self.weigh)

    def by_energy(self, seen: Seen, sizes: torch.Tensor, removed: int, margin: float, has_cls: bool) -> Clusters:
        """Pure: `(views, tokens, dim)` hidden states in, clusters out."""
        return match_energy(seen[Hidden()], removed, margin, has_cls)
