"""Attention mass in Triton: two passes over tiles of scores, which never exist all at one time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmprune.kernels.checks import Refused
from vlmprune.kernels.triton_common import processors, single, start

__all__ = ["attention_mass", "tiles"]

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
MOST_SPLITS = 16
# what no compiled kernel depends on: a prompt's numbers, and where in memory begins what may be a part of something
PROMPT = {
    "do_not_specialize": ["rows", "keys", "heads", "group", "splits", "window", "scale", "padded", "biased"],
    "do_not_specialize_on_alignment": ["at", "real", "bias", "weight"],
}


@triton.jit
def scores_of(
    query, key, at, real, bias, row, column, rows, keys, dim, query_step, key_step, scale, window, padded, biased,
    CAUSAL: tl.constexpr, WIDE: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """A tile of scaled scores: what a row may not see is the lowest number, what is no key minus infinity."""
    d = tl.arange(0, DIM)
    q = tl.load(query + row[:, None] * query_step + d, mask=(row < rows)[:, None] & (d < dim), other=0)
    k = tl.load(key + column[:, None] * key_step + d, mask=(column < keys)[:, None] & (d < dim), other=0)
    # products of half-precision numbers are exact in float32; float32 must not become tf32
    if WIDE:
        q, k = q.to(tl.float32), k.to(tl.float32)
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    score += tl.load(bias + column, mask=(column < keys) & (biased != 0), other=0)[None]
    if CAUSAL:
        here = tl.load(at + row, mask=row < rows, other=0)[:, None]
        score = tl.where((column[None] <= here) & (column[None] > here - window), score, LOWEST)
    there = tl.load(real + column, mask=(column < keys) & (padded != 0), other=1) != 0
    score = tl.where(there[None], score, LOWEST)
    return tl.where((column < keys)[None], score, float("-inf"))


@triton.jit
def joined(largest, below, other, more):
    """Two running sums of exponentials, each below its largest score, as one; an infinite largest has no sum yet."""
    now = tl.maximum(largest, other)
    base = tl.where(now == float("-inf"), 0.0, now)
    return now, below * tl.exp(largest - base) + more * tl.exp(other - base)


@triton.jit(**PROMPT)
def softmax_kernel(
    query, key, at, real, bias, top, total, rows, keys, dim, heads, group, query_batch, query_head, query_step,
    key_batch, key_head, key_step, scale, window, splits, padded, biased, CAUSAL: tl.constexpr,
    WIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The largest score of every row, and the sum of the exponentials below it, over a share of the keys."""
    head, batch = (tl.program_id(1) % heads).to(tl.int64), (tl.program_id(1) // heads).to(tl.int64)
    part = tl.program_id(0) % splits
    row = tl.program_id(0) // splits * ROWS + tl.arange(0, ROWS)
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head // group * key_head
    each = tl.cdiv(tl.cdiv(keys, splits), KEYS) * KEYS
    begin, end = min(part * each, keys), min(part * each + each, keys)
    unseen = 0
    if CAUSAL:  # tiles that no row sees are not computed, only counted: they matter to rows that see nothing
        last = tl.max(tl.load(at + batch * rows + row, mask=row < rows, other=-1), 0).to(tl.int32)
        stop = min(end, begin + tl.cdiv(tl.maximum(last + 1 - begin, 0), KEYS) * KEYS)
        unseen = end - stop
        end = stop
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    below = tl.zeros((ROWS,), tl.float32)
    for first in range(begin, end, KEYS):
        column = first + tl.arange(0, KEYS)
        score = scores_of(
            query, key, at + batch * rows, real + batch * keys, bias + batch * keys, row, column,
            rows, keys, dim, query_step, key_step, scale, window, padded, biased, CAUSAL, WIDE, DIM,
        )  # fmt: skip
        now = tl.max(score, 1)
        base = tl.where(now == float("-inf"), 0.0, now)
        largest, below = joined(largest, below, now, tl.sum(tl.exp(score - base[:, None]), 1))
    if CAUSAL:  # noqa: SIM102 - decided while compiling
        if unseen > 0:
            none = tl.full((ROWS,), LOWEST, tl.float32)
            largest, below = joined(largest, below, none, tl.zeros((ROWS,), tl.float32) + unseen)
    out = ((batch * heads + head) * splits + part) * rows + row
    tl.store(top + out, largest, mask=row < rows)
    tl.store(total + out, below, mask=row < rows)


@triton.jit(**PROMPT)
def mass_kernel(
    query, key, at, real, bias, weight, top, total, out, rows, keys, dim, heads, group, query_batch, query_head,
    query_step, key_batch, key_head, key_step, scale, window, splits, padded, biased,
    CAUSAL: tl.constexpr, WIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The weighted column sums of one head's attention for one block of keys, in one pass over the rows."""
    head, batch = (tl.program_id(1) % heads).to(tl.int64), (tl.program_id(1) // heads).to(tl.int64)
    column = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head // group * key_head
    mass = tl.zeros((KEYS,), tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        largest = tl.full((ROWS,), float("-inf"), tl.float32)
        below = tl.zeros((ROWS,), tl.float32)
        for part in range(splits):
            mine = ((batch * heads + head) * splits + part) * rows + row
            largest, below = joined(
                largest, below, tl.load(top + mine, mask=row < rows, other=0),
                tl.load(total + mine, mask=row < rows, other=1),
            )  # fmt: skip
        needed = 1
        if CAUSAL:  # rows above the diagonal give nothing, unless they see nothing at all or hold a NaN
            here = tl.load(at + batch * rows + row, mask=row < rows, other=-1)
            gives = (here >= tl.program_id(0) * KEYS) | ((largest > LOWEST) & (below == below) == 0)
            needed = tl.max((gives & (row < rows)).to(tl.int32), 0)
        if needed != 0:
            score = scores_of(
                query, key, at + batch * rows, real + batch * keys, bias + batch * keys, row, column, rows, keys, dim,
                query_step, key_step, scale, window, padded, biased, CAUSAL, WIDE, DIM,
            )  # fmt: skip
            share = tl.load(weight + batch * rows + row, mask=row < rows, other=0)
            given = tl.exp(score - largest[:, None]) * (share / below)[:, None]
            mass += tl.sum(tl.where((row < rows)[:, None], given, 0.0), 0)
    tl.store(out + (batch * heads + head) * keys + column, mass, mask=column < keys)


def tiles(rows: int, dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Sizes of a program: a few rows need no tall tiles, and what a program holds must fit its registers.

    Products in float32 run without tensor cores and hold whole rows of both factors.
    """
    wide = max(16, triton.next_power_of_2(dim))
    if dtype == torch.float32:
        tall, keys = 16, 32 if wide <= 64 else 16
    else:
        tall, keys = (64, 64) if wide <= 128 else (32, 32)
    return {"ROWS": 16 if rows <= 16 else tall, "KEYS": keys, "DIM": wide, "num_warps": 4}


def attention_mass(
    query: Tensor,
    key: Tensor,
    scale: float,
    at: Tensor | None,
    real: Tensor | None,
    window: int,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    single(query, key)
    (batch, heads, rows, dim), keys = query.shape, key.shape[2]
    if dim > 256:
        raise Refused("heads have more than 256 numbers")
    if 0 in (batch, rows, keys, heads):
        return query.new_zeros(batch, keys, dtype=torch.float32)
    device, kind = query.device, query.dtype if query.dtype == key.dtype else torch.float32
    query, key = (x.to(kind) if x.stride(-1) == 1 else x.to(kind).contiguous() for x in (query, key))
    weight = query.new_full((batch, rows), 1 / rows, dtype=torch.float32) if weight is None else weight.float()
    none = query.new_empty(0, dtype=torch.float32)
    seen = [
        none if at is None else at.expand(batch, -1).contiguous(),
        none.view(torch.uint8) if real is None else real.expand(batch, -1).contiguous().view(torch.uint8),
        none if bias is None else bias.float().expand(batch, -1).contiguous(),
    ]
    size = tiles(rows, dim, kind)
    blocks = triton.cdiv(rows, size["ROWS"]) * batch * heads
    splits = max(1, min(MOST_SPLITS, triton.cdiv(keys, size["KEYS"]), 2 * processors(device) // blocks))
    numbers = [rows, keys, dim, heads, heads // key.shape[1], *query.stride()[:3], *key.stride()[:3], float(scale)]
    numbers += [window or rows + keys + 2**30, splits, int(real is not None), int(bias is not None)]
    size["CAUSAL"] = at is not None
    size["WIDE"] = kind == torch.bfloat16 and not query.is_cuda  # Triton's interpreter has no bfloat16 products
    top, total = (query.new_empty(batch, heads, splits, rows, dtype=torch.float32) for _ in range(2))
    grid = (triton.cdiv(rows, size["ROWS"]) * splits, batch * heads)
    start(device, softmax_kernel, grid, query, key, *seen, top, total, *numbers, **size)
    mass = query.new_empty(batch, heads, keys, dtype=torch.float32)
    start(
        device, mass_kernel, (triton.cdiv(keys, size["KEYS"]), batch * heads), query, key, *seen,
        weight.expand(batch, -1).contiguous(), top, total, mass, *numbers, **size,
    )  # fmt: skip
    return mass.mean(1)
