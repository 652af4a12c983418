"""Choosing by score and gathering, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmprune.kernels.reference import empty_gather
from vlmprune.kernels.triton_common import LOWEST_KEY, block_of, ordered, processors, single, start, warps

__all__ = ["select_gather", "top_k"]

TILE = 4096  # columns of which a program of top_k holds the keys at once
WIDE, NARROW = 1024, 128  # numbers of a row of hidden states and of a rotary embedding that are moved at once


@triton.jit
def best(score, among, wanted):
    """Mark the `wanted` best of `among`: the key of the last one to stay is found bit by bit, ties are counted."""
    key = tl.where(among, ordered(score), LOWEST_KEY)
    number = tl.minimum(tl.maximum(wanted, 0), tl.sum(among.to(tl.int32), 0)).to(tl.int32)
    limit = number * 0 + LOWEST_KEY
    bit = number * 0 + LOWEST_KEY
    for _ in range(32):  # at run time: unrolled, it takes seconds to compile
        higher = limit ^ bit  # the sign's bit is set in the lowest key and clear in a higher one
        limit = tl.where(tl.sum((key >= higher).to(tl.int32), 0) >= number, higher, limit)
        bit = (bit >> 1) & 0x7FFFFFFF
    above, tied = key > limit, key == limit
    need = number - tl.sum(above.to(tl.int32), 0)
    return (above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= need))) & (number > 0)


@triton.jit(do_not_specialize=["columns"], do_not_specialize_on_alignment=["scores", "counts", "candidates"])
def top_k_kernel(scores, counts, candidates, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    at, inside = row * columns + column, column < columns
    among = (tl.load(candidates + at, mask=inside, other=0) != 0) & inside
    kept = best(tl.load(scores + at, mask=inside, other=0), among, tl.load(counts + row))
    tl.store(out + at, kept.to(tl.uint8), mask=inside)


@triton.jit
def keys_of(scores, candidates, row, begin, columns, TILE: tl.constexpr):
    """Keys of a tile of a row's columns; the lowest where there is no candidate."""
    column = begin + tl.arange(0, TILE)
    at, inside = row * columns + column, column < columns
    among = (tl.load(candidates + at, mask=inside, other=0) != 0) & inside
    return tl.where(among, ordered(tl.load(scores + at, mask=inside, other=0)), LOWEST_KEY)


@triton.jit
def at_least(scores, candidates, row, limit, columns, TILE: tl.constexpr):
    """How many keys of a row are no lower than the limit."""
    found = tl.zeros((TILE,), tl.int32)
    for begin in range(0, columns, TILE):
        found += (keys_of(scores, candidates, row, begin, columns, TILE) >= limit).to(tl.int32)
    return tl.sum(found, 0)


@triton.jit(do_not_specialize=["columns"], do_not_specialize_on_alignment=["scores", "counts", "candidates"])
def top_k_tiled_kernel(scores, counts, candidates, out, columns, TILE: tl.constexpr):
    """`best` for rows that have no room in registers: every bit reads the row anew, from the cache."""
    row = tl.program_id(0).to(tl.int64)
    there = at_least(scores, candidates, row, LOWEST_KEY + 1, columns, TILE)
    number = tl.minimum(tl.maximum(tl.load(counts + row), 0), there).to(tl.int32)
    limit = number * 0 + LOWEST_KEY
    bit = number * 0 + LOWEST_KEY
    for _ in range(32):
        higher = limit ^ bit
        limit = tl.where(at_least(scores, candidates, row, higher, columns, TILE) >= number, higher, limit)
        bit = (bit >> 1) & 0x7FFFFFFF
    # no key is above the highest, which is a NaN's
    need = number
    if limit < 0x7FFFFFFF:
        need = number - at_least(scores, candidates, row, limit + 1, columns, TILE)
    for begin in range(0, columns, TILE):
        key = keys_of(scores, candidates, row, begin, columns, TILE)
        tied = (key == limit).to(tl.int32)
        kept = ((key > limit) | ((tied != 0) & (tl.cumsum(tied, 0) <= need))) & (number > 0)
        need -= tl.sum(tied, 0)
        column = begin + tl.arange(0, TILE)
        tl.store(out + row * columns + column, kept.to(tl.uint8), mask=column < columns)


def top_k(scores: Tensor, counts: Tensor, candidates: Tensor) -> Tensor:
    single(scores)
    columns = scores.shape[-1]
    out = torch.empty_like(candidates, memory_format=torch.contiguous_format)
    if out.numel():
        given = (
            scores.float().contiguous(), counts.expand(scores.shape[:-1]).long().contiguous(),
            candidates.contiguous().view(torch.uint8), out.view(torch.uint8), columns,
        )  # fmt: skip
        rows = (out.numel() // columns,)
        if columns <= TILE:
            block = block_of(columns)
            start(scores.device, top_k_kernel, rows, *given, BLOCK=block, num_warps=warps(block))
        else:
            start(scores.device, top_k_tiled_kernel, rows, *given, TILE=TILE, num_warps=warps(TILE))
    return out


@triton.jit
def copy_row(source, to, n, BLOCK: tl.constexpr):
    for begin in range(0, n, BLOCK):
        part = begin + tl.arange(0, BLOCK)
        tl.store(to + part, tl.load(source + part, mask=part < n), mask=part < n)


# numbers that a model fixes are specialised, so that rows are moved in wide accesses; those of a prompt are not
@triton.jit(
    do_not_specialize=[
        "columns", "length", "rows", "axes", "rotary_axes", "score_sample", "score_step", "real_sample", "real_step",
        "ids_axis", "ids_sample", "ids_step", "padded", "contiguous",
    ],
    do_not_specialize_on_alignment=["scores", "counts", "real", "ids"],
)  # fmt: skip
def select_gather_kernel(
    scores, counts, real, hidden, ids, cos, sin, hidden_out, ids_out, cos_out, sin_out, index_out, mask_out,
    dropped_out, columns, length, rows, dim, rotary, axes, rotary_axes, score_sample, score_step, real_sample,
    real_step, hidden_sample, hidden_step, ids_axis, ids_sample, ids_step, cos_axis, cos_sample, cos_step, sin_axis,
    sin_sample, sin_step, padded, contiguous, RANK: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    NARROW: tl.constexpr,
):  # fmt: skip
    first, sample, batch = tl.program_id(0) * rows, tl.program_id(1).to(tl.int64), tl.num_programs(1)
    column = tl.arange(0, BLOCK)
    among = column < columns
    score = tl.load(scores + sample * score_sample + column * score_step, mask=among, other=0)
    among &= tl.load(real + sample * real_sample + column * real_step, mask=among & (padded != 0), other=1) != 0
    if RANK:  # noqa: SIM108 - decided while compiling
        kept = best(score, among, tl.load(counts + sample))
    else:
        kept = (score != 0) & among
    rank = tl.cumsum(kept.to(tl.int32), 0)
    total = tl.sum(kept.to(tl.int32), 0)
    gone = tl.cumsum((among & (kept == 0)).to(tl.int32), 0)
    # kept columns fill the right end in order, the last of the others the padding before them
    slot = tl.where(kept, length - total + rank - 1, column - rank - (columns - length))
    slot = tl.where(column < columns, slot, -1)
    if first == 0:
        tl.store(dropped_out + sample, (tl.sum(among.to(tl.int32), 0) - total).to(tl.int64))
    for row in range(first, min(first + rows, length)):
        here = slot == row
        source = tl.sum(tl.where(here, column, 0), 0).to(tl.int64)
        out = sample * length + row
        tl.store(index_out + out, source)
        tl.store(mask_out + out, (row >= length - total).to(tl.uint8))
        for axis in range(axes):
            number = tl.load(ids + axis * ids_axis + sample * ids_sample + source * ids_step)
            if contiguous != 0:
                number = tl.maximum(number - tl.sum(tl.where(here, gone, 0), 0), 0)
            tl.store(ids_out + axis * batch * length + out, number)
        copy_row(hidden + sample * hidden_sample + source * hidden_step, hidden_out + out * dim, dim, WIDE)
        for axis in range(rotary_axes):
            to = (axis * batch * length + out) * rotary
            copy_row(cos + axis * cos_axis + sample * cos_sample + source * cos_step, cos_out + to, rotary, NARROW)
            copy_row(sin + axis * sin_axis + sample * sin_sample + source * sin_step, sin_out + to, rotary, NARROW)


def rows_of(x: Tensor) -> tuple[Tensor, list[int]]:
    """`x` with rows that lie in one piece, and its steps from one axis, sample and column to the next."""
    x = x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()
    return x, [0] * (4 - x.ndim) + list(x.stride()[:-1])


def select_gather(
    scores: Tensor,
    counts: Tensor | None,
    real: Tensor | None,
    hidden: Tensor,
    ids: Tensor,
    cos: Tensor,
    sin: Tensor,
    length: int,
    contiguous: bool,
) -> tuple[Tensor, ...]:
    single(scores)
    (batch, columns), rotary = scores.shape, cos.shape[-1]
    block, scores = block_of(columns), scores if counts is None else scores.float()
    outs = empty_gather(scores, hidden, ids, cos, sin, length)
    if batch == 0:
        return outs
    (hidden, step), (cos, cos_step), (sin, sin_step) = map(rows_of, (hidden, cos, sin))
    # a program finds its columns anew and looks for each of its rows among all of them
    rows = max(1, min(16, -(-batch * length // (2 * processors(hidden.device)))))
    byte = lambda x: x.view(torch.uint8) if x.dtype == torch.bool else x  # noqa: E731
    none = hidden.new_empty(0, dtype=torch.long)
    if not rotary:  # steps between nothing: those of an empty tensor change from prompt to prompt
        cos_step = sin_step = [0, 0, 0]
    start(
        hidden.device, select_gather_kernel, (max(1, triton.cdiv(length, rows)), batch), byte(scores),
        none if counts is None else counts.long().contiguous(),
        none.view(torch.uint8) if real is None else byte(real), hidden, ids, cos, sin, *outs[:5], byte(outs[5]),
        outs[6], columns, length, rows, hidden.shape[-1], rotary, 1 if ids.ndim == 2 else ids.shape[0],
        (1 if cos.ndim == 3 else cos.shape[0]) if rotary else 0,
        *scores.stride(), *((0, 0) if real is None else real.stride()), *step[1:],
        *[0] * (3 - ids.ndim), *ids.stride(), *cos_step, *sin_step, int(real is not None), int(contiguous),
        RANK=counts is not None, BLOCK=block, WIDE=WIDE, NARROW=NARROW, num_warps=warps(block),
    )  # fmt: skip
    return outs
