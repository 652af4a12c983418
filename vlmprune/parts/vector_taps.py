"""Taps of the vision tower beside its plain rows of attention: features, keys, and what is made of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn.functional import normalize

from vlmprune.parts.attention import attention_mass, masses_by_head, upcast
from vlmprune.parts.facts import ModelFacts
from vlmprune.parts.layers import TowerLayer
from vlmprune.parts.scores import outlying
from vlmprune.parts.selection import top_k
from vlmprune.parts.taps import Hidden, Tap, TowerTap, VisionAttention, VisionRows

__all__ = ["ContextRelevance", "Density", "Outlying", "PageRank", "TowerFeatures", "WholeKeys", "WholeRow"]
__all__ += ["context_relevance", "density", "features_of", "row_of"]


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
        score = torch.ones_like(upcast(query[..., 0]))
        score[..., :first] = score.shape[-1] ** 0.5
        score = score / score.sum(-1, keepdim=True)
        for _ in range(self.iterations):
            score = masses_by_head(query, key, layer.scale, score)
        return (score**2).mean(1).sqrt()[:, first:]


def context_relevance(
    query: torch.Tensor, key: torch.Tensor, scale: float, threshold: float, first: int
) -> torch.Tensor:
    """How much the context tokens of a view look at every patch, summed over them, head mean: `(views, patches)`.

    Context are the patches that receive more than `threshold` times the mean attention of all patches' rows; where none
    does, the one that receives most.

    Args:
        query: `(views, heads, patches, dim)`; key: `(views, heads, first + patches, dim)`.
        first: tokens in front of the patches.
    """
    received = attention_mass(query, key, scale)[:, first:]
    context = received > threshold * received.mean(1, keepdim=True)
    most = top_k(received, [1] * len(received), torch.ones_like(context))
    context = torch.where(context.any(1, keepdim=True), context, most)
    return attention_mass(query, key, scale, weight=context.to(received))[:, first:]


@dataclass(frozen=True)
class ContextRelevance(TowerTap):
    """`context_relevance` in a tower layer, `(images, tokens)` float32."""

    attends: ClassVar[bool] = True

    threshold: float = 0.0

    def measure(self, layer: TowerLayer, hidden: torch.Tensor, has_cls: bool) -> torch.Tensor:
        first, normed = int(has_cls), layer.normed(hidden)
        query, key = layer.queries(normed[:, first:]), layer.keys(normed)
        return context_relevance(query, key, layer.scale, self.threshold, first)


def density(keys: torch.Tensor, alike: float, doubles: int) -> torch.Tensor:
    """Share of the patches that have at most `doubles` others with a cosine above `alike`: `(views,)`.

    Args:
        keys: `(views, patches, dim)`.
    """
    unit = normalize(keys, dim=-1)
    others = torch.cat([(part @ unit.transpose(-1, -2) > alike).sum(-1) - 1 for part in unit.split(256, 1)], 1)
    return (others <= doubles).float().mean(1)


@dataclass(frozen=True)
class Outlying(TowerTap):
    """`outlying` of the [CLS] row (or of what patches receive) in a tower layer, `(images, tokens)` float32."""

    rows: Literal["cls", "patches"] = "cls"

    def measure(self, layer: TowerLayer, hidden: torch.Tensor, has_cls: bool) -> torch.Tensor:
        return outlying(VisionAttention(self.layer, self.rows).measure(layer, hidden, has_cls))


@dataclass(frozen=True)
class Density(TowerTap):
    """`density` of the view that a patch is in, by the keys of a tower layer, `(images, tokens)` float32."""

    alike: float = 0.0
    doubles: int = 0

    def measure(self, layer: TowerLayer, hidden: torch.Tensor, has_cls: bool) -> torch.Tensor:
        keys = WholeKeys(self.layer).measure(layer, hidden, has_cls)
        return density(keys, self.alike, self.doubles)[:, None].expand(-1, keys.shape[1])


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
