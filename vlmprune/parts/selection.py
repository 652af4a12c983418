"""Choosing tokens: top-k with a documented tie rule, whole rows, and what happens to newlines."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch

from vlmprune import kernels
from vlmprune.parts.budget import count, share
from vlmprune.parts.cuts import Merge, Reduction
from vlmprune.parts.layout import Layout, download, upload

__all__ = [
    "AnyNewlines",
    "Newlines",
    "Scope",
    "by_view",
    "candidates",
    "capped",
    "contest",
    "keep_patches",
    "select",
    "select_each",
    "select_rows",
    "stride",
    "top_k",
]

Newlines = Literal["all", "row", "none"]
#: Of methods that let newlines compete with patches: they count on `candidates` for who competes.
AnyNewlines = Literal["all", "row", "none", "candidates"]
Scope = Literal["view", "image"]
Keep = int | float | list[int] | Callable[[int], int]


def top_k(scores: torch.Tensor, counts: list[int] | torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Mark the `counts` best candidates of every row.

    Ties go to the lower index; a row with fewer candidates than its count keeps them all. No device sync.

    Args:
        scores: `(..., tokens)` float.
        counts: one count a row, a (nested) list or a `(...)` tensor.
        candidates: `(..., tokens)` bool.

    Returns:
        `(..., tokens)` bool.
    """
    return kernels.call("top_k", scores, upload(counts, scores.device), candidates)


def stride(candidates: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Mark `counts` evenly spaced candidates of every row: every n-th from the first, n the largest that reaches them.

    Args:
        candidates: `(rows, tokens)` bool.

    Returns:
        `(rows, tokens)` bool; all candidates of a row that has fewer.
    """
    number, total = candidates.cumsum(1) - 1, candidates.sum(1, keepdim=True)
    wanted = upload(counts, candidates.device)[:, None]
    step = (total // wanted.clamp(min=1)).clamp(min=1)
    return candidates & (number % step == 0) & (number // step < wanted)


def keep_newlines(keep: torch.Tensor, layout: Layout, policy: AnyNewlines) -> torch.Tensor:
    """Add the newlines that `policy` keeps to `(images, tokens)` kept patches."""
    if policy in ("none", "candidates"):
        return keep
    newline = layout.newline & layout.alive
    if policy == "all":
        return keep | newline
    # a newline closes the tokens of its canvas since the last newline; of a video, whose only one is the last, all
    closed = layout.stack("line")
    several = upload([len(grid.planes) > 1 and not grid.apart for grid in layout.grids], layout.device)
    in_row = keep & ((layout.plane == 1) | ~several[:, None])
    hits = torch.zeros_like(closed).scatter_add_(1, closed, in_row.long())
    return keep | (newline & (hits.gather(1, closed) > 0))


def keep_patches(
    keep: torch.Tensor,
    layout: Layout,
    counts: list[int] | None,
    newlines: AnyNewlines,
    scores: torch.Tensor | None = None,
    merge: Merge | None = None,
) -> Reduction:
    """Turn `(images, tokens)` kept patches into a reduction, adding newlines by policy.

    Args:
        keep: bool mask of kept patches (of candidates of both kinds for `newlines="candidates"`).
        counts: number of True per row where known.
    """
    total, patches = counts, counts
    if newlines == "candidates":
        patches = None
    elif newlines == "row":
        total = None if layout.newlines else counts
    elif newlines == "all" and counts is not None:
        if layout.alive_patches is None:
            total = None
        else:
            alive = zip(counts, layout.alive_counts, layout.alive_patches, strict=True)
            total = [c + tokens - patch for c, tokens, patch in alive]
    return Reduction(keep_newlines(keep, layout, newlines), total, patches, merge, scores)


def select(
    scores: torch.Tensor,
    keep: Keep,
    layout: Layout,
    newlines: AnyNewlines = "all",
    scope: Scope = "image",
) -> Reduction:
    """Keep every image's best-scored tokens.

    Args:
        scores: `(images, tokens)`; higher is better.
        keep: budget in patches per image or video (tokens for `newlines="candidates"`, which lets newlines compete), or
            (for `scope="image"`) one count for each, or what says how many stay of so many that entered the LLM.
        scope: "image" ranks all patches of an image or video together, "view" gives each view (thumbnail, crop, frame)
            its share of the budget.
    """
    if scope == "view":
        return select_in_views(scores, keep, layout, newlines)
    among, counts, reached = contest(layout, keep, newlines)
    return keep_patches(top_k(scores, counts, among), layout, reached, newlines, scores)


def select_each(
    scores: torch.Tensor,
    keep: int | float,
    layout: Layout,
    newlines: AnyNewlines,
    choose: Callable[[int, torch.Tensor, int], torch.Tensor],
) -> Reduction:
    """Keep what `choose` takes of every image's candidates, one image after the other.

    Args:
        scores: `(images, tokens)`; higher is better.
        keep: budget in patches per image or video.
        choose: of an image's number, its candidates from the best to the worst, `(candidates,)` long, and how many of
            them shall stay: which do, `(candidates,)` bool.
    """
    among, totals, available = candidates(layout, newlines)
    there = download(among.sum(1)) if available is None else available
    counts, mask = capped([count(keep, total) for total in totals], there), torch.zeros_like(among)
    for i, (wanted, alive) in enumerate(zip(counts, there, strict=True)):
        order = scores[i].masked_fill(~among[i], -torch.inf).sort(descending=True, stable=True).indices[:alive]
        if alive and not mask.is_meta:  # where only the number is asked for
            mask[i] = mask[i].scatter(0, order, choose(i, order, wanted))
    return keep_patches(mask, layout, counts, newlines, scores)


def select_in_views(scores: torch.Tensor, keep: int | float, layout: Layout, newlines: AnyNewlines) -> Reduction:
    """`select` with a share of the budget for each view."""
    rows, shares, counts = by_view(layout, keep, newlines)
    return keep_patches(top_k(scores[:, None].expand_as(rows), shares, rows).any(1), layout, counts, newlines, scores)


def by_view(
    layout: Layout, keep: int | float | list[int], newlines: AnyNewlines = "all"
) -> tuple[torch.Tensor, list[list[int]] | torch.Tensor, list[int] | None]:
    """Who competes in every view (thumbnail, crop, frame), and its share of a budget.

    Args:
        keep: budget in patches per image or video, or one count for each.

    Returns:
        `(images, views, tokens)` bool; `(images, views)` how many stay; how many do of every image, None if unknown.
    """
    among, _, available = candidates(layout, newlines)
    views = max(grid.views for grid in layout.grids)
    keeps = keep if isinstance(keep, list) else [keep] * len(layout)
    shares = [
        share(each, grid.patches_per_view) + [0] * (views - grid.views)
        for each, grid in zip(keeps, layout.grids, strict=True)
    ]
    mine = layout.view[:, None] == torch.arange(views, device=layout.device)[:, None]
    rows = (among[:, None] & mine) if views > 1 else among[:, None]
    untouched = available == [grid.patches for grid in layout.grids]
    if not untouched and isinstance(keep, float):  # of what an earlier cut has left of each view
        table = [count(keep, total) for total in range(layout.width + 1)]
        return rows, upload(table, layout.device)[rows.sum(-1)], None
    return rows, shares, [sum(s) for s in shares] if untouched else None


def select_rows(scores: torch.Tensor, keep: int | float, layout: Layout, newlines: Newlines = "all") -> Reduction:
    """Keep the rows of every plane (the thumbnail, the canvas of crops, a frame) whose mean score is best.

    Args:
        scores: `(images, tokens)`; higher is better.
        keep: budget in patches per image or video, of which as many whole rows stay as it pays for: at least one per
            plane of a fraction, one in all of a count.
    """
    planes = max(len(grid.planes) for grid in layout.grids)
    tallest = max(rows for grid in layout.grids for rows, _ in grid.planes)
    paid = [rows_per_plane(keep, grid.planes) for grid in layout.grids]
    line = layout.plane * tallest + layout.row
    zeros, patches = scores.new_zeros(len(layout), planes * tallest), layout.patches.to(scores.dtype)
    mass = zeros.scatter_add(1, line, scores * patches).unflatten(1, (planes, tallest))
    size = zeros.scatter_add(1, line, patches).unflatten(1, (planes, tallest))
    counts = [rows + [0] * (planes - len(rows)) for rows in paid]
    best = top_k(mass / size.clamp(min=1), counts, size > 0).flatten(1)
    total = [
        sum(n * cols for n, (_, cols) in zip(rows, grid.planes, strict=True))
        for rows, grid in zip(paid, layout.grids, strict=True)
    ]
    keep_line = best.gather(1, line) & layout.patches
    return keep_patches(keep_line, layout, total if layout.whole else None, newlines, scores)


def rows_per_plane(keep: int | float, planes: tuple[tuple[int, int], ...]) -> list[int]:
    """Whole rows of every plane that a budget pays for: at least one per plane of a fraction, one in all of a count."""
    if isinstance(keep, float):
        return [count(keep, rows) for rows, _ in planes]
    shares = share(keep, [rows * cols for rows, cols in planes])
    counts = [min(rows, part // cols) for part, (rows, cols) in zip(shares, planes, strict=True)]
    return counts if any(counts) else [1] + [0] * (len(planes) - 1)


def candidates(layout: Layout, newlines: AnyNewlines) -> tuple[torch.Tensor, list[int], list[int] | None]:
    """Who competes: `(images, tokens)` bool, their number when they entered the LLM, and now (None if unknown)."""
    if newlines == "candidates":
        return layout.alive, layout.entered, layout.alive_counts
    entered = layout.entered_patches or [grid.patches for grid in layout.grids]
    return layout.patches, entered, layout.alive_patches


def contest(layout: Layout, keep: Keep, newlines: AnyNewlines) -> tuple[torch.Tensor, list[int], list[int] | None]:
    """Who competes for a budget (as of `select`): `(images, tokens)` bool, how many it keeps of every image, and how
    many that really are, None where the host does not know what an earlier cut has left.
    """
    among, totals, available = candidates(layout, newlines)
    stay = keep if callable(keep) else partial(count, keep)
    counts = keep if isinstance(keep, list) else [stay(total) for total in totals]
    return among, counts, capped(counts, available)


def capped(counts: list[int], available: list[int] | None) -> list[int] | None:
    """Counts that a selection really reaches: at most what is there, unknown if that is unknown."""
    return None if available is None else [min(c, a) for c, a in zip(counts, available, strict=True)]
