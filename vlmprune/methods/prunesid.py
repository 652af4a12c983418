"""PruneSID (arXiv 2603.09480; code ZhengyaoFang/PruneSID)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize, one_hot

from vlmprune.methods.base import BeforeLLM, Layout, ModelFacts, Reduction, Seen, Tap, register
from vlmprune.parts import download, features_of, principal_groups, row_of, select_each, survivors, upcast, upload

__all__ = ["PruneSID", "allotted"]


def allotted(survive: list[int], sizes: list[int], keep: int) -> list[int]:
    """How many tokens every group gets: one if it has any, the rest in proportion to survivors, under a cap.

    The cap is 5 for every 64 tokens kept, and no more than survive; it is raised for all groups by one at a time until
    they can take `keep`. What proportions leave goes to the largest groups.
    """
    cap, more = [min(5 * -(-keep // 64), s) for s in survive], 0
    most = cap
    while sum(most) < min(keep, sum(sizes)):
        more += 1
        most = [min(c + more, size) for c, size in zip(cap, sizes, strict=True)]
    part = [min(1, m) for m in most]
    while sum(part) > keep:  # more groups than tokens to keep: the smallest get none
        part[min((g for g in range(len(part)) if part[g]), key=lambda g: (sizes[g], -g))] = 0
    rest, whole, seen, given = keep - sum(part), max(1, sum(survive)), 0, 0
    for g, s in enumerate(survive):
        seen += s
        due = round(rest * seen / whole) - given
        given += due
        part[g] = min(part[g] + due, most[g])
    for g in sorted(range(len(sizes)), key=lambda g: (-sizes[g], g)):
        part[g] += min(most[g] - part[g], max(0, keep - sum(part)))
    return part


@register("prunesid")
@dataclass(frozen=True)
class PruneSID(BeforeLLM):
    """Group patches by principal directions of their features, thin out each group, and keep some of every one.

    A quarter as many groups as tokens are kept (the released code gives one place to the [CLS] token). In a group
    patches that are too much like a better one (by `row_of` the layer whose output becomes the features) are
    suppressed; what survives comes first. The bar of likeness is the image's mean cosine times a 32nd of the budget.
    The released code finds the directions by random projections; here they are exact.
    """

    summary = "patches grouped by principal directions, each group thinned out"
    paper = "arXiv 2603.09480"
    needs = "tower features and attention"
    looks_at = "features"
    syncs = 8  # about: one an image for its groups, one for every round in which a group is thinned out
    refuses: ClassVar[dict[str, str]] = {
        "parity": "the released code draws random numbers, and there is nothing to repeat."
    }

    def see(self, facts: ModelFacts) -> tuple[Tap, ...]:
        return features_of(facts), row_of(facts)

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: features and one attention row in, decision out."""
        features, row = seen.values()
        choose = lambda image, order, keep: self.choose(features[image, order], keep)  # noqa: E731
        return select_each(row, self.budget, layout, self.newlines, choose)

    def choose(self, features: torch.Tensor, keep: int) -> torch.Tensor:
        """`(tokens,)` bool of the kept ones among `(tokens, dim)`, from the best to the worst."""
        features, tokens = upcast(features), len(features)
        number = max(1, min(keep // 4, tokens))
        group, unit = principal_groups(features, number), normalize(features, dim=-1)
        cosine = unit @ unit.T
        mean = (cosine.sum() - cosine.diagonal().sum()) / max(1, tokens * (tokens - 1))
        first = survivors(group, cosine, mean * keep / 32)
        member, alive = one_hot(group, number), first[:, None]
        survive, sizes = download(torch.stack(((member * alive).sum(0), member.sum(0))))
        # survivors by attention, then the others: rank of every token in its group
        ahead, behind = (member * alive).cumsum(0), (member * alive).sum(0) + (member * ~alive).cumsum(0)
        rank = torch.where(alive, ahead, behind).gather(1, group[:, None])[:, 0] - 1
        return rank < upload(allotted(survive, sizes, keep), group.device)[group]
