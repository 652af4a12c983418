"""Greedy selection alone: the library's against the loops that papers published."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from vlmprune import kernels as ops
from vlmprune.eval.bench.clock import Clock
from vlmprune.eval.bench.results import describe_machine
from vlmprune.eval.bench.run import Replaced
from vlmprune.eval.bench.stats import ratio, spread
from vlmprune.parts.coverage import Cover, greedy_cover
from vlmprune.parts.diversity import greedy_diversity
from vlmprune.runtime.answering import guarded
from vlmprune.runtime.status import status

__all__ = ["SIZES", "compare_selection", "measured", "published_coverage", "published_dpp", "published_max_min"]


def published_max_min(features: torch.Tensor, first: int | None, count: int) -> list[int]:
    """The greedy loop that DivPrune published (arXiv 2503.02175), in our words.

    All distances in one matrix product; at each step the rows of the picks are collected and their minimum taken anew.

    Args:
        features: `(tokens, dim)`.
        first: the first pick; None for DivPrune's own, the token whose nearest other token is farthest.

    Returns:
        `count` token numbers in the order of their picks.
    """
    x = features.float()
    x = x / x.norm(dim=-1, keepdim=True)
    distance = 1 - x @ x.T
    picked = torch.empty(count, dtype=torch.long, device=x.device)
    for i in range(count):
        if i:
            nearest = distance.index_select(0, picked[:i]).min(dim=0).values
        else:
            nearest = distance.topk(2, dim=0, largest=False).values[1]
        picked[i] = first if i == 0 and first is not None else nearest.argmax()
    return picked.tolist()


def published_dpp(features: torch.Tensor, first: int | None, count: int) -> list[int]:
    """The greedy loop that CDPruner published (arXiv 2506.10967; its determinantal point process), in our words.

    All cosines in one matrix product, then incremental Cholesky (arXiv 1709.05135). The relevance that CDPruner weights
    them with is left out.

    Args:
        features: `(tokens, dim)`.
        first: the first pick; None for the best by the diagonal.

    Returns:
        `count` token numbers in the order of their picks.
    """
    x = features.float()[None]
    x = x / x.norm(dim=-1, keepdim=True)
    kernel = x @ x.transpose(1, 2)
    left = kernel.diagonal(dim1=1, dim2=2).clone()
    known = kernel.new_zeros(count, 1, kernel.shape[1])
    picked, image = torch.empty(count, 1, dtype=torch.long, device=x.device), torch.arange(1, device=x.device)
    for i in range(count):
        best = left.argmax(dim=-1)
        if i == 0 and first is not None:
            best.fill_(first)
        picked[i] = best
        along = torch.einsum("tb,tbn->bn", known[:i, image, best], known[:i])
        known[i] = (kernel[image, best] - along) / left[image, best].sqrt()[:, None]
        left -= known[i].square()
        left[image, best] = -torch.inf
    return picked[:, 0].tolist()


def published_coverage(features: torch.Tensor, first: int | None, count: int) -> list[int]:
    """The greedy loop that SCOPE and MMTok published (arXiv 2510.24214, 2508.18264), in our words.

    All cosines in one matrix product; at each step what every token adds to the cover of all is summed up anew. What
    they weight it with is left out.

    Args:
        features: `(tokens, dim)`.
        first: the first pick; None for the token that covers most.

    Returns:
        `count` token numbers in the order of their picks.
    """
    x = features.float()
    x = x / x.norm(dim=-1, keepdim=True)
    cosine = x @ x.T
    covered, left = cosine.new_zeros(len(x)), torch.ones(len(x), dtype=torch.bool, device=x.device)
    picked = torch.empty(count, dtype=torch.long, device=x.device)
    for i in range(count):
        gain = torch.relu(cosine - covered[:, None]).sum(0)
        picked[i] = first if i == 0 and first is not None else gain.masked_fill(~left, -torch.inf).argmax()
        left[picked[i]] = False
        covered = torch.maximum(covered, cosine[:, picked[i]])
    return picked.tolist()


def ours(objective: str, features: torch.Tensor, first: torch.Tensor, keep: int) -> torch.Tensor:
    """The library's picks of `(1, tokens, dim)`, in order; coverage has a first pick of its own."""
    everyone = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    if objective == "coverage":
        tokens = features[0].float()
        return greedy_cover([Cover(tokens, tokens, everyone[0])], keep, everyone[0])
    return greedy_diversity(features, first, [keep], everyone, objective)[1][0]


SIZES = ((576, 64), (2880, 320))  # tokens and picks that papers report
PUBLISHED = {"max_min": published_max_min, "log_det": published_dpp, "coverage": published_coverage}


def features_like(tokens: int, dim: int, seed: int) -> torch.Tensor:
    """Made-up features with what those of towers have: a mean that all share, and few directions that most lies in."""
    g = torch.Generator().manual_seed(seed)
    few = torch.randn(tokens, 48, generator=g) @ torch.randn(48, dim, generator=g)
    return torch.randn(tokens, dim, generator=g) + 0.3 * few + torch.randn(dim, generator=g)


def measured(device: str, pairs: int, kernels: str) -> dict[str, Any]:
    """All sizes, as a document: with the machine, and what plain torch stood in for."""
    status("timing selection")
    replaced = Replaced()
    with ops.use(kernels):
        found = guarded(lambda: [one for size in SIZES for one in compare_selection(*size, device=device, pairs=pairs)])
    return {
        "selection": found,
        "machine": describe_machine(device),
        "kernels": kernels,
        "replaced": replaced.tell(),
    }


def compare_selection(
    tokens: int = 2880,
    keep: int = 320,
    dim: int = 1024,
    device: str = "cpu",
    pairs: int = 15,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[dict[str, Any]]:
    """Time ours and the published loop in turns for every objective, after a warm-up, from the same first pick.

    Returns:
        Per objective the times in milliseconds, `speedup` (published / ours, 95 % interval) and the share of picks that
        are the same: sums in another order may break a tie differently, after which greedy picks part.
    """
    clock, made = Clock(device), []
    features = features_like(tokens, dim, seed)[None].to(device, dtype)
    first = torch.zeros(1, dtype=torch.long, device=device)
    for objective, published in PUBLISHED.items():
        start = None if objective == "coverage" else 0
        order = [
            ("ours", partial(ours, objective, features, first, keep)),
            ("published", partial(published, features[0], start, keep)),
        ]
        both: dict[str, list[float]] = {"ours": [], "published": []}
        for i in range(pairs + 1):
            for name, call in order if i % 2 else order[::-1]:
                result, seconds = clock.time(call)
                if i:
                    both[name].append(seconds)
                if name == "ours":
                    mine = set(result.tolist())
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
                "published_ms": spread(both["published"]),
                "speedup": ratio(both["published"], both["ours"]),
                "same_picks": len(mine & reference) / keep,
            }
        )
    return made
