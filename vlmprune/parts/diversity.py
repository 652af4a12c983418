"""Greedy diverse subsets: one pick at a time, each in O(tokens), for all images at once."""

from __future__ import annotations

from typing import Literal

import torch

from vlmprune import kernels
from vlmprune.kernels.precision import product
from vlmprune.kernels.reference import floor
from vlmprune.parts.attention import upcast
from vlmprune.parts.cuts import Reduction
from vlmprune.parts.layout import Layout, upload
from vlmprune.parts.selection import AnyNewlines, contest, keep_patches

__all__ = ["Objective", "dedupe", "greedy_diversity", "most_apart", "principal_groups", "select_diverse"]
__all__ += ["select_weighted", "survivors", "weighted_det"]

CHUNK = 256  # rows of a cosine matrix that exist at one time

SPANNED = 1e-30  # stands for nothing

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
    return kernels.call("greedy", features, first, budget, candidates, objective, max(counts, default=0))


def weighted_det(features: torch.Tensor, weight: torch.Tensor, picks: int, candidates: torch.Tensor) -> torch.Tensor:
    """Pick tokens that weigh much and differ: the greedy maximum of a determinantal point process.

    Its kernel is the cosine of two tokens times the weights of both; incremental Cholesky (arXiv 1709.05135), without
    a device sync. Ties go to the lower index.

    Args:
        features: `(images, tokens, dim)`; weight: `(images, tokens)` of at least 0.
        picks: how many.
        candidates: `(images, tokens)` bool.

    Returns:
        `(images, picks)` long, in order; arbitrary past an image's candidates.
    """
    unit = torch.nn.functional.normalize(upcast(features), dim=-1)
    weight, image = weight.to(unit.dtype), torch.arange(len(unit), device=unit.device)
    kernel = weight[:, :, None] * product(unit, unit.transpose(1, 2)) * weight[:, None]
    left = kernel.diagonal(dim1=1, dim2=2).masked_fill(~candidates, -torch.inf)
    basis, order = [], []
    for _ in range(picks):
        best = left.argmax(1)
        along, rest = kernel[image, best], left[image, best]
        if basis:
            known = torch.stack(basis)
            own = known[:, image, best].T[:, None]
            along = along - product(own, known.transpose(0, 1)).squeeze(1)
        along = torch.where(rest[:, None] > SPANNED, along / rest.clamp(min=SPANNED).sqrt()[:, None], 0)
        left = torch.where(left > -torch.inf, left - along.square(), left)
        # what is left of a token in the span of the picks is rounding: it goes by its weight alone, after all others
        spanned = (left > -torch.inf) & (left <= floor(left.dtype) * weight.square())
        left = torch.where(spanned, SPANNED * weight, left)
        left = left.scatter(1, best[:, None], -torch.inf)
        basis.append(along)
        order.append(best)
    return torch.stack(order, 1) if order else torch.zeros(len(unit), 0, dtype=torch.long, device=unit.device)


def most_apart(features: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """The candidate whose most similar other candidate is least similar, by cosine; ties go to the lower index.

    Args:
        features: `(images, tokens, dim)`.
        candidates: `(images, tokens)` bool.

    Returns:
        `(images,)` long.
    """
    unit = torch.nn.functional.normalize(upcast(features), dim=-1)
    number = torch.arange(unit.shape[1], device=unit.device)
    nearest = []
    for rows in number.split(CHUNK):
        cosine = product(unit[:, rows], unit.transpose(-1, -2))
        others = candidates[:, None] & (rows[:, None] != number)
        nearest.append(cosine.masked_fill(~others, -torch.inf).amax(-1))
    return torch.cat(nearest, 1).masked_fill(~candidates, torch.inf).argmin(1)


def principal_groups(features: torch.Tensor, number: int) -> torch.Tensor:
    """`(tokens,)` long: the principal direction, of the `number` first ones, on which a token weighs most.

    The directions are those of the sigmoid of the features `(tokens, dim)`, tokens as columns, each less its mean.
    """
    y = torch.sigmoid(features)
    y = y - y.mean(1, keepdim=True)
    if y.shape[0] <= y.shape[1]:
        loading = torch.linalg.eigh(y @ y.T).eigenvectors[:, -number:]
    else:  # of more tokens than numbers, by the smaller matrix
        value, vector = torch.linalg.eigh(y.T @ y)
        loading = y @ vector[:, -number:] / value[-number:].clamp(min=torch.finfo(y.dtype).tiny).sqrt()
    return loading.abs().flip(1).argmax(1)


def survivors(group: torch.Tensor, cosine: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """`(tokens,)` bool: the tokens of each group that are not too much like a better one that survives.

    Args:
        group: `(tokens,)` long, of tokens from the best to the worst; cosine: `(tokens, tokens)`.
    """
    number = torch.arange(len(group), device=group.device)
    worse = (group == group[:, None]) & (number[:, None] < number)
    hides = (worse & (cosine > tau)).float()
    left, before = torch.ones_like(group, dtype=torch.bool), None
    while before is None or not torch.equal(left, before):  # a few rounds, as many as the longest chain of likes
        before, left = left, left.float() @ hides == 0
    return left


def dedupe(unit: torch.Tensor, target: int, step: int = 8) -> torch.Tensor:
    """Drop near duplicates until `target` tokens are left.

    In rounds: tokens at even places are compared with those at odd ones, and up to `step` even ones that are most like
    an odd one go. What is left of the even ones, by falling likeness, and the odd ones are the next round's order.

    Args:
        unit: `(tokens, dim)` of length 1, in the order of the first round.

    Returns:
        `(target,)` long, in the order of the last round.
    """
    cosine, left = unit @ unit.T, torch.arange(len(unit), device=unit.device)
    while len(left) > max(target, 0):
        even, odd = left[::2], left[1::2]
        if not len(odd):
            return left[:target]
        # not a stable sort: so the released code orders what float32 cannot tell apart
        alike = cosine[even][:, odd].amax(1).argsort(descending=True)
        left = torch.cat((even[alike[min(step, len(left) - target) :]], odd))
    return left


def select_diverse(
    features: torch.Tensor,
    first: torch.Tensor | None,
    keep: int | float,
    layout: Layout,
    newlines: AnyNewlines,
    objective: Objective,
) -> Reduction:
    """Keep mutually dissimilar tokens of every image (`greedy_diversity`).

    Args:
        features: `(images, tokens, dim)`.
        first: `(images,)` long, the first pick of every image; None starts from the candidate that is `most_apart`.
        keep: budget in patches per image or video (tokens for `newlines="candidates"`).
    """
    among, counts, reached = contest(layout, keep, newlines)
    first = most_apart(features, among) if first is None else first
    picked, _ = greedy_diversity(features, first, counts, among, objective)
    return keep_patches(picked & among, layout, reached, newlines)


def select_weighted(
    features: torch.Tensor, weight: torch.Tensor, keep: int | float, layout: Layout, newlines: AnyNewlines
) -> Reduction:
    """Keep tokens of every image that weigh much and differ (`weighted_det`).

    Args:
        features: `(images, tokens, dim)`; weight: `(images, tokens)` of at least 0.
        keep: as of `select_diverse`.
    """
    among, counts, reached = contest(layout, keep, newlines)
    order = weighted_det(features, weight, max(counts), among)
    inside = torch.arange(order.shape[1], device=order.device) < upload(counts, order.device)[:, None]
    spare = among.new_zeros(len(among), among.shape[1] + 1)
    picked = spare.scatter(1, torch.where(inside, order, among.shape[1]), True)[:, :-1]
    return keep_patches(picked & among, layout, reached, newlines)
