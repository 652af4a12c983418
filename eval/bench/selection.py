"""Greedy selection alone: the library's incremental loop against the textbook one."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from vlmprune.eval.bench.clock import Clock
from vlmprune.eval.bench.stats import ratio, spread
from vlmprune.parts.diversity import Objective, greedy_diversity

__all__ = ["compare_selection", "textbook"]


def textbook(features: torch.Tensor, first: int, count: int, objective: Objective) -> list[int]:
    """The loop as papers write it: each step computes every token's cosine to all that are picked, again.

    Args:
        features: `(tokens, dim)`.
        first: the first pick.

    Returns:
        `count` token numbers in the order of their picks.
    """
    x = functional.normalize(features.float(), dim=-1)
    picked = [first]
    while len(picked) < count:
        cosine = x @ x[picked].T
        value = -cosine.sum(1) if objective == "max_sum" else (1 - cosine).amin(1)
        value[picked] = -torch.inf
        picked.append(int(value.argmax()))
    return picked


def compare_selection(
    tokens: int = 2880,
    keep: int = 320,
    dim: int = 1024,
    device: str = "cpu",
    pairs: int = 15,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[dict[str, Any]]:
    """Time both loops in turns for both objectives, after a warm-up.

    Returns:
        Per objective the times in milliseconds, `speedup` (textbook / ours, 95 % interval) and the share of picks that
        are the same: sums in another order may break a tie differently, after which greedy picks part.
    """
    clock, made = Clock(device), []
    features = torch.randn(1, tokens, dim, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    first = torch.zeros(1, dtype=torch.long, device=device)
    candidates = torch.ones(1, tokens, dtype=torch.bool, device=device)
    for objective in ("max_min", "max_sum"):

        def ours(objective: Objective = objective) -> torch.Tensor:
            return greedy_diversity(features, first, [keep], candidates, objective)[1]

        def theirs(objective: Objective = objective) -> list[int]:
            return textbook(features[0], 0, keep, objective)

        both: dict[str, list[float]] = {"ours": [], "textbook": []}
        for i in range(pairs + 1):
            order = [("ours", ours), ("textbook", theirs)]
            for name, call in order if i % 2 else order[::-1]:
                result, seconds = clock.time(call)
                if i:
                    both[name].append(seconds)
                if name == "ours":
                    mine = set(result[0].tolist())
                else:
                    reference = set(result)
        made.append(
            {
                "objective": objective,
                "tokens": tokens,
                "keep": keep,
                "dim": dim,
                "dtype": str(dtype).removeprefix("torch."),
                "ours_ms": spread(both["ours"]),
                "textbook_ms": spread(both["textbook"]),
                "speedup": ratio(both["textbook"], both["ours"]),
                "same_picks": len(mine & reference) / keep,
            }
        )
    return made
