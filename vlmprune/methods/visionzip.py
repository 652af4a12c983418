"""VisionZip (arXiv 2412.04467; code dvlab-research/VisionZip)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmprune.methods.base import AnyCut, BehindTower, Merge, ModelFacts, Pick, Seen, register
from vlmprune.parts import BlockKeys, Share, Views, VisionAttention, gather_to, stride, top_k, upload

__all__ = ["VisionZip"]


@register("visionzip")
@dataclass(frozen=True)
class VisionZip(BehindTower):
    """Keep the patches that the tower's [CLS] token looks at, and a few into which all others are merged by their keys.

    Per view: the dominant tokens are the [CLS] token itself and the patches it looks at most, in the layer whose output
    becomes the features. Of the rest every n-th is a contextual token: it becomes itself plus the mean of the patches
    whose keys (head mean) are most like its own, a sum of two averages as in the released code. A tower without a [CLS]
    token is read by the attention that a patch receives (as the released code does for SigLIP).

    Args:
        keep, average: views share it in proportion to their patches. The [CLS] token counts as one, and stands at the
            first place that nothing else takes (the released code puts it first, and contextual tokens last).
        contextual: share of the budget that merges: 5/32 gives the released 30 of 192, 20 of 128, 10 of 64. At most
            what the [CLS] token leaves of it.
        newlines: kept; the released code drops them with the un-padding.
    """

    summary = "patches that [CLS] looks at, and a few that the others are merged into"
    paper = "arXiv 2412.04467"
    needs = "tower attention and keys"
    looks_at = "tower"

    contextual: Share = 5 / 32

    def cuts(self, facts: ModelFacts) -> list[AnyCut]:
        row = VisionAttention(facts.feature_layer, "cls" if facts.has_cls else "patches")
        return self.behind(row, BlockKeys(facts.feature_layer))

    def merge(self, seen: Seen, views: Views) -> Pick:
        """Pure: one attention row and the keys of every view in, what anchors become out."""
        row, keys = seen.values()
        cls, present, shares = (
            keys.shape[1] - row.shape[1],
            upload(views.present, row.device),
            views.shares(self.budget),
        )
        # to be divided among the three kinds: what keeps all its patches stays as it is
        split = [0 if kept == total else kept for kept, total in zip(shares, views.patches, strict=True)]
        extra = [cls if n else 0 for n in split]
        contextual = [min(round(n * self.contextual), n - e) for n, e in zip(split, extra, strict=True)]
        strong = [kept - n - e for kept, n, e in zip(shares, contextual, extra, strict=True)]
        dominant = top_k(row, strong, present)
        rest = present & ~dominant
        targets = stride(rest, contextual)
        into, flows = gather_to(keys[:, cls:], rest & ~targets, targets)
        number = torch.zeros_like(row).scatter_add(1, into, flows.to(row))
        weight = torch.where(targets, 1.0, flows / number.gather(1, into).clamp(min=1))
        keep = dominant | targets
        if cls:
            # [CLS] stands where nothing else is left
            place = (present & ~keep).long().argmax(1, keepdim=True)
            here = upload(extra, row.device)[:, None] > 0
            keep = keep.scatter(1, place, keep.gather(1, place) | here)
            # the patch whose place it takes may have flowed into a target: it still does
            into, weight = torch.cat((place, into), 1), torch.cat((here.to(weight), weight), 1)
        return Pick(keep, Merge(into + cls, weight))
