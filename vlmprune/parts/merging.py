"""Merging tokens in the vision tower and behind it. Everything here is a pure function of tensors."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from vlmprune.parts.attention import upcast
from vlmprune.parts.cuts import Clusters, Merge, Pick
from vlmprune.parts.layout import Layout, upload
from vlmprune.parts.selection import top_k

__all__ = [
    "energy",
    "first_of_cluster",
    "flow",
    "gather_to",
    "match_alternating",
    "match_energy",
    "nearest_mean",
    "peaks",
    "picked",
    "recycle",
    "spread_evenly",
]

CHUNK = 256  # rows of a cosine matrix that exist at one time


def spread_evenly(removed: int, layers: int) -> list[int]:
    """Tokens to remove per layer: as equal as whole numbers allow, the larger ones first."""
    base, extra = divmod(removed, layers)
    return [base + (i < extra) for i in range(layers)]


def assign(
    order_a: torch.Tensor,
    order_b: torch.Tensor,
    similarity: torch.Tensor,
    removed: int,
    protected: torch.Tensor | None,
    in_order: bool = True,
) -> Clusters:
    """Merge the `removed` tokens of A with the most similar partner into that partner.

    New order: what is protected, what is left of A, B.

    Args:
        order_a, order_b: `(views, a)` and `(views, b)` long token numbers of the two sides.
        similarity: `(views, a, b)`.
        protected: `(views, p)` long, tokens in neither side, or None.
        in_order: what is left of A keeps A's order; else the more similar its partner, the earlier a token comes.
    """
    views, tokens_a, tokens_b = similarity.shape
    best, partner = similarity.max(-1)
    rank = best.sort(dim=-1, descending=True, stable=True).indices
    gone, left = rank[:, :removed], rank[:, removed:]
    left = left.sort(dim=-1).values if in_order else left
    first = 0 if protected is None else protected.shape[1]
    tokens = first + tokens_a + tokens_b
    into = torch.empty(views, tokens, dtype=torch.long, device=similarity.device)
    number = torch.arange(tokens, device=similarity.device).expand(views, -1)
    if protected is not None:
        into.scatter_(1, protected, number[:, :first])
    start_b = first + tokens_a - removed
    into.scatter_(1, order_a.gather(1, left), number[:, first:start_b])
    into.scatter_(1, order_b, number[:, start_b : start_b + tokens_b])
    into.scatter_(1, order_a.gather(1, gone), start_b + partner.gather(1, gone))
    return Clusters(into, start_b + tokens_b)


def match_alternating(metric: torch.Tensor, removed: int, has_cls: bool) -> Clusters:
    """ToMe's bipartite matching: even positions against odd ones, the [CLS] token left out.

    The new order, on which the next matching hangs, is the released code's: it sorts what is left of the even ones only
    where that brings a [CLS] token to the front.

    Args:
        metric: `(views, tokens, dim)`, compared by cosine.
        removed: tokens to merge away, at most half of the patches.
    """
    x = functional.normalize(upcast(metric), dim=-1)
    views, tokens, _ = x.shape
    number = torch.arange(tokens, device=x.device).expand(views, -1)
    # with a [CLS] token at position 0 the even patches start at 2: it stays in front, in neither side
    a, b = number[:, 2 * has_cls :: 2], number[:, 1::2]
    similarity = x[:, 2 * has_cls :: 2] @ x[:, 1::2].transpose(-1, -2)
    return assign(a, b, similarity, removed, number[:, :1] if has_cls else None, in_order=has_cls)


def energy(x: torch.Tensor, margin: float, alpha: float = 1.0) -> torch.Tensor:
    """PiToMe's energy of every token: mean over all tokens of ELU(cosine - margin); high in redundant clusters.

    Args:
        x: `(views, tokens, dim)`, L2-normalised.

    Returns:
        `(views, tokens)`; cosines exist for `CHUNK` rows at a time.
    """
    rows = [
        functional.elu(x[:, i : i + CHUNK] @ x.transpose(-1, -2) - margin, alpha).mean(-1)
        for i in range(0, x.shape[1], CHUNK)
    ]
    return torch.cat(rows, 1)


def match_energy(metric: torch.Tensor, removed: int, margin: float, has_cls: bool) -> Clusters:
    """PiToMe's matching: the 2 * removed tokens of highest energy are split alternately, the rest is protected.

    New order, as in the released code: [CLS], what is protected by falling energy, the partners.

    Args:
        metric: `(views, tokens, dim)`.
        removed: tokens to merge away, at most half of the patches.
        margin: of the energy.
    """
    x = functional.normalize(upcast(metric), dim=-1)
    first = int(has_cls)
    order = energy(x[:, first:], margin).sort(dim=-1, descending=True, stable=True).indices + first
    mergeable, rest = order[:, : 2 * removed], order[:, 2 * removed :]
    if has_cls:
        rest = torch.cat((torch.zeros_like(order[:, :1]), rest), 1)
    a, b = mergeable[:, ::2], mergeable[:, 1::2]
    take = lambda at: x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))  # noqa: E731
    return assign(a, b, take(a) @ take(b).transpose(-1, -2), removed, rest)


def gather_to(keys: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The target whose key is most like a source's own, by cosine; ties go to the lower index.

    Args:
        keys: `(views, tokens, dim)`.
        sources, targets: `(views, tokens)` bool.

    Returns:
        `(views, tokens)` long, the target of every source (its own number elsewhere), and `(views, tokens)` bool which
        tokens flow: sources of views that have a target.
    """
    unit = functional.normalize(upcast(keys), dim=-1)
    own = torch.arange(keys.shape[1], device=keys.device).expand(sources.shape)
    best = [
        (unit[:, rows] @ unit.transpose(-1, -2)).masked_fill(~targets[:, None], -torch.inf).argmax(-1)
        for rows in own[0].split(CHUNK)
    ]
    flows = sources & targets.any(1, keepdim=True)
    return torch.where(flows, torch.cat(best, 1), own), flows


def nearest_mean(keys: torch.Tensor, kept: torch.Tensor, patches: torch.Tensor) -> Merge:
    """Every dropped patch flows into the kept one that it is most like, which becomes the plain mean of all of them.

    Args:
        keys: `(images, tokens, dim)`, compared by cosine; kept, patches: `(images, tokens)` bool.
    """
    into, flows = gather_to(keys, patches & ~kept, kept)
    number = upcast(torch.ones_like(keys[..., 0]))
    return Merge(into, 1 / number.scatter_add(1, into, flows.to(number)).gather(1, into))


def peaks(
    features: torch.Tensor, among: torch.Tensor, counts: list[int], most: int, neighbours: int = 5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clusters around density peaks (DPC-kNN): centres are dense and far from what is denser.

    Density is exp(-mean squared distance to the `neighbours` nearest, itself included), distances are divided by the
    root of the dimension. Ties go to the lower index.

    Args:
        features: `(images, tokens, dim)`.
        among: `(images, tokens)` bool, who is clustered: all distances between them exist at one time.
        counts: centres per image.
        most: at least the number of tokens that are clustered in any image.

    Returns:
        `(images, tokens)` bool, the centres, and `(images, tokens)` long, the centre of every token of `among` (another
        token's own number).
    """
    index = among.long().sort(dim=1, descending=True, stable=True).indices[:, : max(most, 1)]
    own, real = torch.arange(among.shape[1], device=among.device).expand_as(among), among.gather(1, index)
    x = upcast(features.gather(1, index[..., None].expand(-1, -1, features.shape[-1])))
    pair = real[:, None] & real[:, :, None]
    apart = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[-1] ** 0.5
    near = apart.masked_fill(~pair, torch.inf).sort(dim=-1).values[..., :neighbours]
    close = near < torch.inf
    density = torch.exp(-(near.where(close, 0) ** 2).sum(-1) / close.sum(-1).clamp(min=1))
    number = torch.arange(x.shape[1], device=x.device)
    ahead = (density[:, None] == density[:, :, None]) & (number < number[:, None])
    rise = apart.masked_fill(~(pair & ((density[:, None] > density[:, :, None]) | ahead)), torch.inf).amin(-1)
    rise = torch.where(rise < torch.inf, rise, apart.where(pair, 0).amax((1, 2))[:, None])
    centres = top_k(density * rise, counts, real)
    into = apart.masked_fill(~(pair & centres[:, None]), torch.inf).argmin(-1)
    into = torch.where(real & ~centres, into, number)
    return torch.zeros_like(among).scatter(1, index, centres), own.scatter(1, index, index.gather(1, into))


def recycle(
    scores: torch.Tensor, cell: torch.Tensor, patches: torch.Tensor, counts: list[int], cells: list[int]
) -> tuple[torch.Tensor, Merge]:
    """Keep the best tokens, and in every cell the mean of the others, weighted by their scores, at the best of them.

    Args:
        scores: `(images, tokens)`; cell: `(images, tokens)` long; patches: `(images, tokens)` bool.
        counts: tokens that stay of every image, the recycled ones included.
        cells: number of cells of every image; 0 recycles nothing.

    Returns:
        `(images, tokens)` bool, and how tokens flow. Where the budget does not pay for all cells those with the best
        tokens stay; where cells have nothing to recycle, the next best tokens take their places.
    """
    strong = top_k(scores, [max(0, n - c) for n, c in zip(counts, cells, strict=True)], patches)
    rest = patches & ~strong & (upload(cells, scores.device)[:, None] > 0)
    width, number = scores.shape[1], torch.arange(scores.shape[1], device=scores.device).expand_as(cell)
    low = torch.finfo(scores.dtype).min
    shape = (len(scores), int(max(cells, default=0)) + 1)
    box = torch.where(rest, cell, shape[1] - 1)
    top = torch.full(shape, low, dtype=scores.dtype, device=scores.device).scatter_reduce(
        1, box, torch.where(rest, scores, low), "amax"
    )
    best = rest & (scores == top.gather(1, box))
    first = torch.full(shape, width, device=scores.device).scatter_reduce(
        1, box, torch.where(best, number, width), "amin"
    )
    wanted = upload(counts, scores.device)
    anchors = top_k(scores, wanted - strong.sum(1), rest & (number == first.gather(1, box)))
    keep = strong | anchors
    keep = keep | top_k(scores, wanted - keep.sum(1), patches & ~keep)
    into = torch.where(rest, first.gather(1, box).clamp(max=width - 1), number)
    flows = rest & anchors.gather(1, into) & (anchors | ~keep)
    into = torch.where(flows, into, number)
    weight = torch.where(flows, scores.clamp(min=torch.finfo(scores.dtype).tiny), 0)
    total = torch.zeros_like(weight).scatter_add(1, into, weight)
    weight = torch.where(flows, weight / total.gather(1, into), (~flows & ~rest | keep).to(scores))
    return keep, Merge(into, weight)


def first_of_cluster(cluster: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Mark the first patch of every cluster of every view; all patches of a cluster carry the same token.

    Args:
        cluster: `(images, tokens)` long, the cluster's number within the token's view.

    Returns:
        `(images, tokens)` bool.
    """
    patches = layout.patches
    # newlines and padding get a key of their own
    most = max(math.prod(grid.side) for grid in layout.grids) + 1
    last = max(grid.views for grid in layout.grids) * most
    key = torch.where(patches, layout.view * most + cluster, last)
    token = torch.arange(layout.width, device=key.device).expand_as(key)
    first = torch.full((len(layout), last + 1), layout.width, device=key.device)
    first = first.scatter_reduce(1, key, token, "amin")
    return patches & (first.gather(1, key) == token)


def picked(hidden: torch.Tensor, pick: Pick) -> torch.Tensor:
    """What a cut between tower and projector makes of `(views, tokens, dim)`, the [CLS] token's included."""
    if pick.merge is not None:
        return flow(hidden, pick.merge)
    if pick.mix is None:
        return hidden
    patches = pick.mix.shape[-1]
    wide = torch.promote_types(hidden.dtype, pick.mix.dtype)
    mixed = pick.mix.to(wide) @ hidden[:, -patches:].to(wide)
    return torch.cat((hidden[:, :-patches], mixed.to(hidden.dtype)), 1)


def flow(hidden: torch.Tensor, merge: Merge) -> torch.Tensor:
    """`(views, tokens, dim)` with every anchor that `merge` names replaced by the weighted sum of its sources."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    source = (
        hidden if merge.source is None else hidden.gather(1, merge.source[..., None].expand(-1, -1, hidden.shape[-1]))
    )
    parts = source.to(wide) * merge.weight[..., None].to(wide)
    summed = parts.new_zeros(hidden.shape).scatter_add(1, merge.into[..., None].expand_as(parts), parts)
    named = merge.weight.new_zeros(hidden.shape[:2]).scatter_add(1, merge.into, (merge.weight != 0).to(merge.weight))
    return torch.where(named[..., None] > 0, summed.to(hidden.dtype), hidden)
