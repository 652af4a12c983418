"""Zero-TPrune (arXiv 2305.17328), behind the tower."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from torch.nn.functional import normalize

from vlmprune.methods.base import AnyNewlines, BeforeLLM, Layout, ModelFacts, Reduction, Seen, Tap, register
from vlmprune.parts import (
    Must,
    PageRank,
    Share,
    WholeKeys,
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

TIMES = Must("a whole number from 1 to 50", partial(is_whole, least=1, most=50))


def without_doubles(scores: torch.Tensor, keys: torch.Tensor, among: torch.Tensor, removed: list[int]) -> torch.Tensor:
    """What is left, `(images, tokens)` bool, when tokens are gone whose keys are most like a more important one's.

    Args:
        scores: `(images, tokens)` importance; its lower half may be removed, the upper half is what they are compared
            with; keys: `(images, tokens, dim)`; among: `(images, tokens)` bool.
        removed: tokens to remove of every image.
    """
    upper = top_k(scores, (among.sum(1) + 1) // 2, among)
    into, flows = gather_to(keys, among & ~upper, upper)
    unit = normalize(upcast(keys), dim=-1)
    like = (unit * unit.gather(1, into[..., None].expand_as(unit))).sum(-1)
    return among & ~top_k(like, removed, flows)


@register("zero_tprune")
@dataclass(frozen=True)
class ZeroTPrune(BeforeLLM):
    """Drop patches whose keys repeat those of a more important one, then keep the most important by `PageRank`.

    The published method prunes between the layers of a classifier; this one cuts once, before the language model, by
    the layer whose output becomes the features, which nobody has published.

    Args:
        iterations: of PageRank. 1, as the paper for deep layers (5 to 10 in the middle, 30 to 50 in shallow ones).
        points: how often patches go, the same share of what is left each time (inferred; the paper has several points,
            searched by hand). With one point and a budget under a half similarity would decide nothing.
        similar: share of what goes at each point that goes for similarity (inferred: a half); the less important half
            of what is left can.
    """

    summary = "patches important by PageRank on the tower's attention, without doubles"
    paper = "arXiv 2305.17328"
    needs = "tower attention (all rows) and keys"
    looks_at = "tower"

    iterations: Annotated[int, TIMES] = 1
    points: Annotated[int, TIMES] = 4
    similar: Share = 0.5
    newlines: AnyNewlines = "all"

    def see(self, facts: ModelFacts) -> tuple[Tap, ...]:
        return PageRank(facts.attention_layer, self.iterations), WholeKeys(facts.attention_layer)

    def at_point(self, count: int, total: int, point: int) -> int:
        """Tokens left of `total` after some of the points, of which the last leaves `count`."""
        return count if point == self.points else max(count, round(total * (count / total) ** (point / self.points)))

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: `(images, tokens)` PageRank and keys in, decision out."""
        scores, keys = seen.values()
        keep, totals, available = candidates(layout, self.newlines)
        counts, left = [count(self.budget, total) for total in totals], totals
        for point in range(1, self.points + 1):
            next_ = [self.at_point(n, total, point) for n, total in zip(counts, totals, strict=True)]
            removed = [floored((before - n) * self.similar) for before, n in zip(left, next_, strict=True)]
            keep, left = top_k(scores, next_, without_doubles(scores, keys, keep, removed)), next_
        return keep_patches(keep, layout, capped(counts, available), self.newlines, scores)
