"""Taps of the vision tower that say more of a patch than one number: features, keys of all heads, values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmprune.parts.attention import attention_mass, upcast
from vlmprune.parts.facts import ModelFacts
from vlmprune.parts.layers import TowerLayer
from vlmprune.parts.taps import Hidden, Tap, TowerTap, VisionAttention, VisionRows

__all__ = ["PageRank", "TowerFeatures", "WholeKeys", "WholeRow", "features_of", "row_of"]


@dataclass(frozen=True)
class TowerFeatures(TowerTap):
    """Every patch's vector at the input of a tower layer, or behind the last, `(images, tokens, dim)`."""

    behind_last: ClassVar[bool] = True
    vectors: ClassVar[bool] = True

    def measure(self, layer: TowerLayer | None, hidden: torch.Tensor, has_cls: bool) -> torch.Tensor:
        return upcast(hidden[:, int(has_cls) :])


@dataclass(frozen=True)
class WholeKeys(TowerTap):
    """Every patch's keys of all heads side by side in a tower layer, `(images, tokens, dim)`."""

    vectors: ClassVar[bool] = True

    def measure(self, layer: TowerLayer, hidden: torch.Tensor, has_cls: bool) -> torch.Tensor:
        return upcast(layer.keys(layer.normed(hidden)).transpose(1, 2).flatten(2)[:, int(has_cls) :])


@dataclass(frozen=True)
class WholeRow(TowerTap):
    """The [CLS] token's attention in a tower layer as if all heads were one, `(images, tokens)`: post-softmax.

    Without a [CLS] token the attention that a patch receives from all.
    """

    attends: ClassVar[bool] = True

    def measure(self, layer: TowerLayer, hidden: torch.Tensor, has_cls: bool) -> torch.Tensor:
        normed, first = layer.normed(hidden), int(has_cls)
        rows = normed[:, :1] if has_cls else normed
        query, key = (x.transpose(1, 2).flatten(2)[:, None] for x in (layer.queries(rows), layer.keys(normed)))
        return attention_mass(query, key, query.shape[-1] ** -0.5)[:, first:]


@dataclass(frozen=True)
class PageRank(TowerTap):
    """Weighted PageRank of every patch on the attention graph of a tower layer, root mean square over heads.

    In every head s becomes A^T s, `iterations` times from a start that is equal for all patches and, where there is a
    [CLS] token, the root of the number of tokens times as much for it (arXiv 2305.17328). Arrives as
    `(images, tokens)` float32.
    """

    attends: ClassVar[bool] = True

    iterations: int = 1

    def measure(self, layer: TowerLayer, hidden: torch.Tensor, has_cls: bool) -> torch.Tensor:
        normed, first = layer.normed(hidden), int(has_cls)
        query, key = layer.queries(normed), layer.keys(normed)
        views, heads, tokens, _ = query.shape
        key = key.repeat_interleave(heads // key.shape[1], 1)
        query, key = query.flatten(0, 1)[:, None], key.flatten(0, 1)[:, None]  # every head a picture of its own
        score = upcast(query).new_ones(views * heads, tokens)
        score[:, :first] = tokens**0.5
        score = score / score.sum(1, keepdim=True)
        for _ in range(self.iterations):
            score = attention_mass(query, key, layer.scale, weight=score)
        return (score.unflatten(0, (views, heads)) ** 2).mean(1).sqrt()[:, first:]


def features_of(facts: ModelFacts) -> Tap:
    """The tap of what becomes the visual features, before the projector.

    Where tokens are no patches as the tower's layers leave them it is the projected features, of which each has one.
    """
    other = facts.packed or facts.unit > 1 or facts.closed
    return Hidden() if other else TowerFeatures(facts.feature_layer + 1)


def row_of(facts: ModelFacts, layer: int | None = None, rows: VisionRows = "cls") -> VisionAttention:
    """Attention on patches in a tower layer, that of the features for None.

    Of the [CLS] token, or without one of all patches. Where patches of a layer see their window alone it is the last
    layer before in which they see all, or the first such layer.
    """
    layer = facts.feature_layer if layer is None else layer
    whole = [n for n in range(facts.tower_layers) if n not in facts.windowed]
    layer = max([n for n in whole if n <= layer], default=min(whole, default=layer))
    return VisionAttention(layer, "patches" if rows == "cls" and not facts.has_cls else rows)
