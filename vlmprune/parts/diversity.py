"""Greedy diverse subsets: one pick at a time, each in O(tokens), for all images at once."""

from __future__ import annotations

from typing import Literal

import torch

import vlmprune.kernels  # noqa: F401 - registers torch.ops.vlmprune
from vlmprune.parts.layout import upload

__all__ = ["Objective", "greedy_diversity"]

Objective = Literal["max_sum", "max_min", "log_det"]


def greedy_diversity(
    features: torch.Tensor, first: torch.Tensor, counts: list[int], candidates: torch.Tensor, objective: Objective
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick mutually dissimilar tokens by cosine distance, starting from a given one.

    "max_sum" picks the token with the smallest sum of cosines to all picked ones; "max_min" (k-center, farthest first)
    the one whose nearest picked token is farthest; "log_det" the one farthest from the span of the picked ones (a
    determinantal point process on the cosines). Ties go to the lower index. No device sync.

    Args:
        features: `(images, tokens, dim)`.
        first: `(images,)` long, the first pick of every image.
        counts: picks per image, the first included; at most the image's candidates.
        candidates: `(images, tokens)` bool.

    Returns:
        `(images, tokens)` bool mask of the picks, and `(images, max(counts))` long their order (arbitrary past an
        image's count).
    """
    budget = upload(counts, features.device)
    return torch.ops.vlmprune.greedy(features, first, budget, candidates, objective, max(counts, default=0))
