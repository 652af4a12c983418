"""Zero-TPrune (arXiv 2305.17328), behind the tower."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from torch.nn.functional import normalize

from vlmprune.methods.base import AnyNewlines, BeforeLLM, Layout, ModelFacts, Reduction, Seen, Tap, register
from vlmprune.parts import PageRank, Share, WholeKeys, count, floored, gather_to, top_k, whole

__all__ = ["ZeroTPrune", "without_doubles"]


def without_doubles(scores: torch.Tensor, keys: torch.Tensor, among: torch.Tensor, removed: list[int]) -> torch.Tensor:
    """What is left, `(images, tokens)` bool, when tokens are gone whose keys are most like a more important one's.

    Args:
        scores: `(images, tokens)` importance; its lower half may be removed, the upper half is what they are compared
            with; keys: `(images, tokens, dim)`; among: `(images, tokens)` bool.
        removed: tokens to remove of every image.
    """
    upper = top_k(scores, (among.sum(1) + 1) // 2, among)
    into, flows = gather_to(keys, among & ~upper, upper)
    unit = normalize(keys, dim=-1)
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
        points: how often patches go, the same share of what is left each time (inferred; the paper searches several by
            hand). With one point and a budget under a half similarity would decide nothing.
        similar: share of what goes at each point that goes for similarity (inferred: a half); the less important half
            of what is left can.
    """

    summary = "patches important by PageRank on the tower's attention, without doubles"
    paper = "arXiv 2305.17328"
    needs = "tower attention (all rows) and keys"
    looks_at = "tower"

    iterations: Annotated[int, whole(1, 50)] = 1
    points: Annotated[int, whole(1, 50)] = 4
    similar: Share = 0.5
    newlines: AnyNewlines = "all"

    def see(self, facts: ModelFacts) -> tuple[Tap, ...]:
        return PageRank(facts.attention_layer, self.iterations), WholeKeys(facts.attention_layer)

    def at_point(self, total: int, point: int) -> int:
        """Tokens left of `total` behind a point; 0 is in front of the first, the last leaves the budget."""
        left = count(self.budget, total)
        return left if point == self.points else max(left, round(total * (left / total) ** (point / self.points)))

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: `(images, tokens)` PageRank and keys in, decision out."""
        scores, keys = seen.values()
        keep, left, _ = self.contest(layout, partial(self.at_point, point=0))
        for point in range(1, self.points + 1):
            _, then, reached = self.contest(layout, partial(self.at_point, point=point))
            removed = [floored((before - after) * self.similar) for before, after in zip(left, then, strict=True)]
            keep, left = top_k(scores, then, without_doubles(scores, keys, keep, removed)), then
        return self.kept(keep, layout, reached, scores)
