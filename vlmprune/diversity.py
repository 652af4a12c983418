"""Greedy diverse subsets: one pick at a time, each in O(tokens), for all images at once."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional

from vlmprune.layout import upload
from vlmprune.taps import upcast

__all__ = ["Objective", "greedy_diversity"]

Objective = Literal["max_sum", "max_min"]


def greedy_diversity(
    features: torch.Tensor, first: torch.Tensor, counts: list[int], candidates: torch.Tensor, objective: Objective
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick mutually dissimilar tokens by cosine distance, starting from a given one.

    "max_sum" picks the token with the smallest sum of cosines to all picked ones; "max_min" (k-center, farthest first)
    the one whose nearest picked token is farthest. Ties go to the lower index. No device sync; no N x N matrix.

    Args:
        features: `(images, tokens, dim)`.
        first: `(images,)` long, the first pick of every image.
        counts: picks per image, the first included; at most the image's candidates.
        candidates: `(images, tokens)` bool.

    Returns:
        `(images, tokens)` bool mask of the picks, and `(images, max(counts))` long their order (arbitrary past an
        image's count).
    """
    x = functional.normalize(upcast(features), dim=-1)
    images, tokens, _ = x.shape
    budget = upload(counts, x.device)
    row = torch.arange(images, device=x.device)
    worst = -torch.inf  # a token that may not be picked (any more)
    value = torch.zeros(images, tokens, dtype=x.dtype, device=x.device)
    if objective == "max_min":
        value += torch.inf
    value = value.masked_fill(~candidates, worst)
    pick, order = first, [first]
    picked = torch.zeros(images, tokens, dtype=torch.bool, device=x.device)
    picked[row, pick] = budget > 0
    for i in range(1, max(counts, default=0)):
        cosine = (x @ x[row, pick, :, None]).squeeze(-1)
        value = value - cosine if objective == "max_sum" else torch.minimum(value, 1 - cosine)
        value = value.scatter(1, pick[:, None], worst)
        pick = value.argmax(1)
        order.append(pick)
        picked[row, pick] |= budget > i
    return picked, torch.stack(order, 1)
