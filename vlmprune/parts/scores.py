"""Scores that several methods rank tokens by."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch

from vlmprune.parts.layout import Layout, upload

__all__ = ["STRIDE", "Ensemble", "ensemble_scores", "outlying", "random_scores"]

Ensemble = Literal["sum", "mean", "max", "min"]
#: How far apart the drawings of two seeds are: image `STRIDE` of seed 0 is image 0 of seed 1.
STRIDE = 1_000_003


def ensemble_scores(rows: list[torch.Tensor], ensemble: Ensemble = "sum") -> torch.Tensor:
    """Combine the rows of several layers (head-mean), each `(..., patches)`, into one score."""
    stack = torch.stack(rows)
    return getattr(stack, {"max": "amax", "min": "amin"}.get(ensemble, ensemble))(0)


def outlying(row: torch.Tensor) -> torch.Tensor:
    """How far every score is above Q3 + 1.5 (Q3 - Q1) of its `(..., patches)` row (NaN apart): outliers are above 0."""
    low, high = (torch.nanquantile(row, q, dim=-1, keepdim=True) for q in (0.25, 0.75))
    return row - (high + 1.5 * (high - low))


def noise(seed: int, ordinal: int, tokens: int) -> torch.Tensor:
    """`(tokens,)` uniform scores, the same on every device and for every batch row."""
    generator = torch.Generator().manual_seed((seed * STRIDE + ordinal) % 2**63)
    return torch.rand(tokens, generator=generator)


#: What torch.compiler.assume_constant_result does to a function, without importing the compiler, which takes a second.
noise._dynamo_marked_constant = True

cached_noise = lru_cache(maxsize=256)(noise)


def random_scores(seed: int, layout: Layout) -> torch.Tensor:
    """`(images, tokens)` uniform scores that depend on the seed, the image's number in its prompt and its size."""
    scores = torch.zeros(layout.position.shape)
    draw = noise if torch.compiler.is_compiling() else cached_noise  # which a compiler would trace into
    for i, (grid, ordinal) in enumerate(zip(layout.grids, layout.ordinal, strict=True)):
        scores[i, : grid.tokens] = draw(seed, ordinal, grid.tokens)
    return upload(scores, layout.device)
