"""Zero-TPrune (arXiv 2305.17328), behind the tower."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from torch.nn import functional

from vlmprune.methods.base import Pruner, register
from vlmprune.parts import (
    AnyNewlines,
    Cut,
    Decoder,
    Layout,
    ModelFacts,
    Must,
    Reduction,
    Seen,
    Share,
    TowerLayer,
    TowerTap,
    WholeKeys,
    attention_mass,
    candidates,
    capped,
    count,
    floored,
    gather_to,
    is_whole,
    keep_patches,
    top_k,
    upcast,
)

__all__ = ["ZeroTPrune", "without_doubles"]

MOST = 50  # iterations


@dataclass(frozen=True)
class PageRank(TowerTap):
    """Weighted PageRank of every patch on the attention graph of a tower layer, root mean square over heads.

    In every head s becomes A^T s, `iterations` times from a start that is equal for all patches and, where there is a
    [CLS] token, the root of the number of tokens times as much for it. Arrives as `(images, tokens)` float32.
    """

    attends: ClassVar[bool] = True

    iterations: int = 1

    def measure(self, layer: TowerLayer, hidden: torch.Tensor, has_cls: bool) -> torch.Tensor:
        normed = layer.normed(hidden)
        query, key = layer.queries(normed), layer.keys(normed)
        views, heads, tokens, _ = query.shape
        key = key.repeat_interleave(heads // key.shape[1], 1)
        query, key = query.flatten(0, 1)[:, None], key.flatten(0, 1)[:, None]  # every head a picture of its own
        score = upcast(query).new_ones(views * heads, tokens)
        score[:, : int(has_cls)] = tokens**0.5
        score = score / score.sum(1, keepdim=True)
        for _ in range(self.iterations):
            score = attention_mass(query, key, layer.scale, weight=score)
        return (score.unflatten(0, (views, heads)) ** 2).mean(1).sqrt()[:, int(has_cls) :]


def without_doubles(scores: torch.Tensor, keys: torch.Tensor, among: torch.Tensor, removed: list[int]) -> torch.Tensor:
    """What is left when the tokens are gone whose keys are most like one of a more important token.

    Args:
        scores: `(images, tokens)` importance; its lower half may be removed, the upper half is what they are compared
            with.
        keys: `(images, tokens, dim)`.
        among: `(images, tokens)` bool.
        removed: tokens to remove of every image.

    Returns:
        `(images, tokens)` bool.
    """
    upper = top_k(scores, (among.sum(1) + 1) // 2, among)
    into, flows = gather_to(keys, among & ~upper, upper)
    unit = functional.normalize(upcast(keys), dim=-1)
    like = (unit * unit.gather(1, into[..., None].expand_as(unit))).sum(-1)
    return among & ~top_k(like, removed, flows)


@register("zero_tprune")
@dataclass(frozen=True)
class ZeroTPrune(Pruner):
    """Drop patches whose keys repeat those of a more important one, then keep the most important by PageRank.

    Importance is weighted PageRank on the attention graph of the layer whose output becomes the features. The published
    method prunes between the layers of a classifier; this one cuts once, before the language model, which nobody has
    published.

    Args:
        keep, average: patches per image, or a fraction.
        iterations: of PageRank. 1, as the paper for deep layers (5 to 10 in the middle, 30 to 50 in shallow ones).
        points: how often patches go, the same share of what is left each time (inferred; the paper has several points,
            searched by hand). With one point and a budget under a half similarity would decide nothing.
        similar: share of what goes at each point that goes for similarity (inferred: a half); the less important half
            of what is left can.
        positions, newlines: as everywhere.

    The paper's filter of heads by their variance is left out: what its thresholds are relative to is not known.
    """

    summary = "patches important by PageRank on the tower's attention, without doubles"
    paper = "arXiv 2305.17328"
    needs = "tower attention (all rows) and keys"
    looks_at = "tower"

    iterations: Annotated[int, Must(f"a whole number from 1 to {MOST}", partial(is_whole, least=1, most=MOST))] = 1
    points: Annotated[int, Must(f"a whole number from 1 to {MOST}", partial(is_whole, least=1, most=MOST))] = 4
    similar: Share = 0.5
    newlines: AnyNewlines = "all"

    def cuts(self, facts: ModelFacts) -> list[Cut]:
        see = (PageRank(facts.attention_layer, self.iterations), WholeKeys(facts.attention_layer))
        return [Cut(Decoder(0), see, self.reduce, self.positions)]

    def at_point(self, count: int, total: int, point: int) -> int:
        """Tokens left of `total` after some of the points, of which the last leaves `count`."""
        return count if point == self.points else max(count, round(total * (count / total) ** (point / self.points)))

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: `(images, tokens)` PageRank and keys in, decision out."""
        scores, keys = seen.values()
        among, totals, available = candidates(layout, self.newlines)
        counts = [count(self.budget, total) for total in totals]
        keep, left = among, totals
        for point in range(1, self.points + 1):
            next_ = [self.at_point(n, total, point) for n, total in zip(counts, totals, strict=True)]
            removed = [floored((before - n) * self.similar) for before, n in zip(left, next_, strict=True)]
            keep, left = top_k(scores, next_, without_doubles(scores, keys, keep, removed)), next_
        return keep_patches(keep, layout, capped(counts, available), self.newlines, scores)
