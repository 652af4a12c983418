"""What attention does to tokens, without ever storing an N x N matrix: masses, scores, and the rows that ask.

Attention is recomputed for the rows asked for, in float32; what needs all rows is chunked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from vlmprune import kernels
from vlmprune.kernels.precision import product
from vlmprune.kernels.reference import CHUNK, by_key_head, upcast, visible_keys

__all__ = [
    "Visible",
    "attention_mass",
    "cls_logits",
    "distinctness",
    "last_rows",
    "masses_by_head",
    "mean_logits",
    "mean_weight",
    "split_heads",
    "take_rows",
    "upcast",
]


class Visible(NamedTuple):
    """What query rows may see: never more than one number per row and key, whatever the product of their numbers.

    Attributes:
        at: `(batch, rows)` long, the column of every row where attention is causal; None where it is not.
        real: `(batch, keys)` bool, keys that are no padding; None if all are.
        window: columns that a causal row sees backwards, itself included; 0 for all.
    """

    at: torch.Tensor | None = None
    real: torch.Tensor | None = None
    window: int = 0


def attention_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    visible: Visible = Visible(),  # noqa: B008 - immutable
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention received by every key: softmax(query key^T * scale + bias), head mean, weighted sum over query rows.

    Args:
        query: `(batch, heads, rows, dim)`.
        key: `(batch, key_heads, keys, dim)`; query heads are grouped over key heads.
        weight: `(batch, rows)` weight of each query row; None is the mean over rows.
        bias: `(batch, keys)` added to the scores on every key, or None.

    Returns:
        `(batch, keys)` in float32 (float64 for float64 input).
    """
    return kernels.call("attention_mass", query, key, scale, *visible, weight, bias)


def masses_by_head(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    weight: torch.Tensor,
    visible: Visible = Visible(),  # noqa: B008
) -> torch.Tensor:
    """As `attention_mass` of every head by itself: `(batch, heads, keys)` for a weight `(batch, heads, rows)`."""
    heads = query.shape[1]
    key = key.repeat_interleave(heads // key.shape[1], 1)
    at, real = (None if x is None else x.repeat_interleave(heads, 0) for x in visible[:2])
    alone = Visible(at, real, visible.window)
    query, key = query.flatten(0, 1)[:, None], key.flatten(0, 1)[:, None]
    return attention_mass(query, key, scale, alone, weight.flatten(0, 1)).unflatten(0, (-1, heads))


def mean_logits(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    visible: Visible = Visible(),  # noqa: B008 - immutable
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `attention_mass` without the softmax: weighted mean over the query rows that see a key; `bias` is ignored."""
    batch, _, rows, _ = query.shape
    keys = key.shape[2]
    query, key = by_key_head(query, key)
    weight = query.new_ones(batch, rows) if weight is None else weight.to(query.dtype)
    total = query.new_zeros(batch, keys)
    seen = torch.zeros_like(total)
    for start in range(0, rows, CHUNK):
        part = slice(start, start + CHUNK)
        share = weight[:, part, None].expand(-1, -1, keys)
        at = None if visible.at is None else visible.at[:, part]
        if (may := visible_keys(at, visible.real, visible.window, keys)) is not None:
            share = share * may
        total += (product(query[:, :, :, part], key).mean((1, 2)) * share).sum(1)
        seen += share.sum(1)
    return total * scale / torch.where(seen > 0, seen, 1)


def cls_logits(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Head mean of the scaled scores of one query, before any softmax.

    Args:
        query: `(..., heads, dim)`; key: `(..., heads, patches, dim)`.

    Returns:
        `(..., patches)`.
    """
    return product(upcast(key), upcast(query)[..., None]).squeeze(-1).mean(-2) * scale


def distinctness(tokens: torch.Tensor) -> torch.Tensor:
    """Negated cosine of every row of `(..., tokens, dim)` to their mean, `(..., tokens)`."""
    tokens = upcast(tokens)
    return -nn.functional.cosine_similarity(tokens, tokens.mean(-2, keepdim=True), dim=-1)


def split_heads(x: torch.Tensor, dim: int) -> torch.Tensor:
    """`(batch, rows, heads * dim)` -> `(batch, heads, rows, dim)`."""
    return x.unflatten(-1, (-1, dim)).transpose(1, 2)


def take_rows(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Rows `at` `(batch, rows)` of `(batch, length, dim)`."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))


def mean_weight(rows: torch.Tensor) -> torch.Tensor:
    """Weights that average the marked rows of `(batch, length)`."""
    return rows.double() / rows.sum(1, keepdim=True).clamp(min=1)


def last_rows(real: torch.Tensor, counts: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The last `counts` real rows of every sample (at least one), and the weights that average them.

    Args:
        real: `(batch, length)` bool.
        counts: `(batch,)` long.
        most: at least the largest of them.

    Returns:
        `(batch, rows)` long indices and `(batch, rows)` float weights, 0 at padding.
    """
    device, n, most = real.device, counts.clamp(min=1)[:, None], max(1, most)
    column = torch.arange(real.shape[1], device=device).expand_as(real)
    # counted from the end among real rows alone: masked ones may lie between them
    rank = real.flip(1).cumsum(1).flip(1)
    slot = torch.where(real & (rank <= n), n - rank, most)
    rows = column.new_zeros(len(real), most + 1).scatter(1, slot, column)[:, :most]
    inside = torch.arange(most, device=device) < n
    last = torch.where(real, column, 0).amax(1, keepdim=True)  # a row that sees something, at no weight
    return torch.where(inside, rows, last), mean_weight(inside)
