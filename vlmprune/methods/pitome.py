"""PiToMe (arXiv 2405.16148): merging inside the vision tower, with what is distinct protected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Annotated

from vlmprune.methods.base import ModelFacts, Tap, TowerMerging, register
from vlmprune.parts import Clusters, Hidden, Vision, layer_of, match_alternating, match_energy

__all__ = ["PiToMe"]


@register("pitome")
@dataclass(frozen=True)
class PiToMe(TowerMerging):
    """Merge patches that live in dense, redundant clusters (high energy) and protect the rest.

    TowerMerging happens at a layer's end, as in the official CLIP patch. Every layer keeps the same share of its tokens
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
