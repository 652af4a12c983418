"""VisionZip (arXiv 2412.04467; code dvlab-research/VisionZip)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmprune.methods.base import BehindTower, register
from vlmprune.parts import (
    AnyCut,
    BlockKeys,
    Merge,
    ModelFacts,
    Pick,
    Seen,
    Share,
    Views,
    VisionAttention,
    gather_to,
    stride,
    top_k,
    upload,
)

__all__ = ["VisionZip", "zip_view"]


def zip_view(
    row: torch.Tensor, keys: torch.Tensor, present: torch.Tensor, dominant: list[int], contextual: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dominant patches, contextual targets, and which target every other patch flows into.

    Args:
        row: `(views, patches)` attention.
        keys: `(views, patches, dim)` head-mean keys.
        present: `(views, patches)` bool, patches that count.
        dominant, contextual: how many of each, per view.

    Returns:
        `(views, patches)` bool dominant and target; `(views, patches)` long the target, and float its weight: one over
        the number of patches that flow there, 0 for those that flow nowhere.
    """
    strong = top_k(row, dominant, present)
    rest = present & ~strong
    targets = stride(rest, contextual)
    into, flows = gather_to(keys, rest & ~targets, targets)
    number = torch.zeros_like(row).scatter_add(1, into, flows.to(row))
    return strong, targets, into, flows / number.gather(1, into).clamp(min=1)


@register("visionzip")
@dataclass(frozen=True)
class VisionZip(BehindTower):
    """Keep the patches that the tower's [CLS] token looks at, and a few into which all others are merged by their keys.

    Per view: the dominant tokens are the [CLS] token itself and the patches it looks at most, in the layer whose output
    becomes the features. Of the rest every n-th is a contextual token: it becomes itself plus the mean of the patches
    whose keys (head mean) are most like its own, a sum of two averages as in the released code. Merging happens between
    tower and projector.

    Args:
        keep, average: patches per image, or a fraction; views share it in proportion to their patches. The [CLS] token
            counts as one, and stands at the first place that nothing else takes (the released code puts it first, and
            contextual tokens last; here all are in the order of their places).
        contextual: share of the budget that merges: 5/32 gives the released 30 of 192, 20 of 128, 10 of 64. At most
            what the [CLS] token leaves of it.
        positions: the family's own; contiguous, as the released code.
        newlines: kept by default; the released code drops them with the un-padding.

    A tower without a [CLS] token is read by the mean attention that a patch receives (as the released code does for
    SigLIP), and all dominant tokens are patches.
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
        cls = keys.shape[1] - row.shape[1]
        present, totals = upload(views.present, row.device), views.patches
        shares = views.shares(self.budget)
        # what keeps all its patches stays as it is
        whole = [kept == total for kept, total in zip(shares, totals, strict=True)]
        extra = [0 if all_ or not kept else cls for kept, all_ in zip(shares, whole, strict=True)]
        left = [0 if all_ else kept - e for kept, all_, e in zip(shares, whole, extra, strict=True)]
        targets = [min(round(kept * self.contextual), most) for kept, most in zip(shares, left, strict=True)]
        strong = [kept - t - e for kept, t, e in zip(shares, targets, extra, strict=True)]
        dominant, anchors, into, weight = zip_view(row, keys[:, cls:], present, strong, targets)
        keep = dominant | anchors
        weight = torch.where(anchors, 1.0, weight)
        into = torch.where(anchors, torch.arange(row.shape[1], device=row.device), into)
        if cls:
            # [CLS] stands where nothing else is left
            place = (present & ~keep).long().argmax(1, keepdim=True)
            here = upload(extra, row.device)[:, None] > 0
            keep = keep.scatter(1, place, keep.gather(1, place) | here)
            # the patch whose place it takes may have flowed into a target: it still does
            into, weight = torch.cat((place, into), 1), torch.cat((here.to(weight), weight), 1)
        return Pick(keep, Merge(into + cls, weight))
