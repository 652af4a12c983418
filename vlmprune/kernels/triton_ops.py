"""Triton implementations. With TRITON_INTERPRET=1 they also run on a CPU, slowly: that is how they are tested there."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmprune.kernels.choice import Refused
from vlmprune.kernels.reference import GRAM_LIMIT, empty_gather, floor, merge_weights

__all__ = ["attention_mass", "greedy", "merge", "select_gather", "top_k"]

MOST_COLUMNS = 16384  # columns of which one program holds all keys in registers
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


def warps(block: int) -> int:
    """Warps of a program that holds `block` columns."""
    return 4 if block <= 1024 else 8 if block <= 4096 else 16


def block_of(columns: int) -> int:
    """The power of two that holds all columns, or Refused."""
    if columns > MOST_COLUMNS:
        raise Refused(f"there are {columns} columns, and {MOST_COLUMNS} are the most")
    return triton.next_power_of_2(max(columns, 16))


def single(*tensors: Tensor) -> None:
    """Refuse float64: the kernels compute in float32."""
    if any(x.dtype == torch.float64 for x in tensors):
        raise Refused("the tensors are float64")


@triton.jit
def best(score, among, wanted):
    """Mark the `wanted` best of `among`: the key of the last one to stay is found bit by bit, ties are counted."""
    bits = tl.where(score == 0.0, 0, score.to(tl.int32, bitcast=True))
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 2147483648
    key = tl.where(score != score, 4294967295, key)
    key = tl.where(among, key, -1)
    number = tl.minimum(tl.maximum(wanted, 0), tl.sum(among.to(tl.int64), 0))
    limit = number * 0
    for bit in tl.static_range(32):
        higher = limit + (1 << (31 - bit))
        limit = tl.where(tl.sum((key >= higher).to(tl.int64), 0) >= number, higher, limit)
    above, tied = key > limit, key == limit
    need = number - tl.sum(above.to(tl.int64), 0)
    return (above | (tied & (tl.cumsum(tied.to(tl.int64), 0) <= need))) & (number > 0)


@triton.jit
def top_k_kernel(scores, counts, candidates, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    at, inside = row * columns + column, column < columns
    among = (tl.load(candidates + at, mask=inside, other=0) != 0) & inside
    score = tl.load(scores + at, mask=inside, other=0).to(tl.float32)
    kept = best(score, among, tl.load(counts + row))
    tl.store(out + at, kept.to(tl.uint8), mask=inside)


def top_k(scores: Tensor, counts: Tensor, candidates: Tensor) -> Tensor:
    single(scores)
    columns = scores.shape[-1]
    out = torch.empty_like(candidates, memory_format=torch.contiguous_format)
    if out.numel():
        block, counts = block_of(columns), counts.expand(scores.shape[:-1]).long().contiguous()
        top_k_kernel[(out.numel() // columns,)](
            scores.contiguous(), counts, candidates.contiguous().view(torch.uint8), out.view(torch.uint8), columns,
            BLOCK=block, num_warps=warps(block),
        )  # fmt: skip
    return out


@triton.jit
def copy_row(source, to, n, BLOCK: tl.constexpr):
    for start in range(0, n, BLOCK):
        part = start + tl.arange(0, BLOCK)
        tl.store(to + part, tl.load(source + part, mask=part < n), mask=part < n)


@triton.jit
def select_gather_kernel(
    keep, real, hidden, ids, cos, sin, hidden_out, ids_out, cos_out, sin_out, index_out, mask_out,
    dropped_out, columns, length, dim, rotary, axes, rotary_axes, keep_sample, keep_step, real_sample, real_step,
    hidden_sample, hidden_step, ids_axis, ids_sample, ids_step, cos_axis, cos_sample, cos_step, sin_axis, sin_sample,
    sin_step, REAL: tl.constexpr, CONTIGUOUS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    first, sample, batch = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64), tl.num_programs(1)
    column = tl.arange(0, BLOCK)
    among = column < columns
    marked = tl.load(keep + sample * keep_sample + column * keep_step, mask=among, other=0) != 0
    if REAL:
        among = (tl.load(real + sample * real_sample + column * real_step, mask=among, other=0) != 0) & among
    kept = marked & among
    rank = tl.cumsum(kept.to(tl.int32), 0)
    total = tl.sum(kept.to(tl.int32), 0)
    gone = tl.cumsum((among & (kept == 0)).to(tl.int32), 0)
    # kept columns fill the right end in order, the last of the others the padding before them
    slot = tl.where(kept, length - total + rank - 1, column - rank - (columns - length))
    slot = tl.where(column < columns, slot, -1)
    if first == 0:
        tl.store(dropped_out + sample, (tl.sum(among.to(tl.int32), 0) - total).to(tl.int64))
    for row in range(first, min(first + ROWS, length)):
        here = slot == row
        source = tl.sum(tl.where(here, column, 0), 0).to(tl.int64)
        out = sample * length + row
        tl.store(index_out + out, source)
        tl.store(mask_out + out, (row >= length - total).to(tl.uint8))
        for axis in range(axes):
            number = tl.load(ids + axis * ids_axis + sample * ids_sample + source * ids_step)
            if CONTIGUOUS:
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
    keep: Tensor,
    real: Tensor | None,
    hidden: Tensor,
    ids: Tensor,
    cos: Tensor,
    sin: Tensor,
    length: int,
    contiguous: bool,
) -> tuple[Tensor, ...]:
    (batch, columns), rotary = keep.shape, cos.shape[-1]
    outs = empty_gather(keep, hidden, ids, cos, sin, length)
    if batch == 0:
        return outs
    (hidden, step), (cos, cos_step), (sin, sin_step) = map(rows_of, (hidden, cos, sin))
    block = block_of(columns)
    # a program finds its columns anew and looks for each of its rows among all of them
    rows = max(1, min(16, -(-batch * length // (256 if hidden.is_cuda else 4))))
    byte = lambda x: x.view(torch.uint8) if x.dtype == torch.bool else x  # noqa: E731
    none = hidden.new_empty(0, dtype=torch.long)
    select_gather_kernel[(max(1, triton.cdiv(length, rows)), batch)](
        byte(keep), none if real is None else byte(real), hidden, ids, cos, sin, *outs[:5], byte(outs[5]), outs[6],
        columns, length, hidden.shape[-1], rotary,
        1 if ids.ndim == 2 else ids.shape[0], (1 if cos.ndim == 3 else cos.shape[0]) if rotary else 0,
        *keep.stride(), *((0, 0) if real is None else real.stride()), *step[1:],
        *[0] * (3 - ids.ndim), *ids.stride(), *cos_step, *sin_step,
        REAL=real is not None, CONTIGUOUS=contiguous, ROWS=rows, BLOCK=block,
        WIDE=min(2048, triton.next_power_of_2(max(hidden.shape[-1], 16))),
        NARROW=min(1024, triton.next_power_of_2(max(rotary, 16))), num_warps=warps(block),
    )  # fmt: skip
    return outs


@triton.jit
def greedy_kernel(
    products, scale, first, counts, candidates, picked, order, basis, tokens, steps, LOW: tl.constexpr,
    OBJECTIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside, mine, own = column < tokens, image * tokens + column, image * tokens
    scales = tl.load(scale + mine, mask=inside, other=0)
    may = tl.load(candidates + mine, mask=inside, other=0) != 0
    start = 0.0 if OBJECTIVE == "max_sum" else 1.0 if OBJECTIVE == "log_det" else float("inf")
    value = tl.where(may & inside, start, float("-inf"))
    pick, count = tl.load(first + image), tl.load(counts + image)
    chosen = (column == pick) & (count > 0)
    tl.store(order + image * steps, pick)
    for i in range(1, steps):
        row = tl.load(products + (own + pick) * tokens + column, mask=inside, other=0)
        cosine = row * scales * tl.load(scale + own + pick)
        if OBJECTIVE == "max_sum":
            value = value - cosine
        elif OBJECTIVE == "max_min":
            value = tl.minimum(value, 1 - cosine)
        else:
            for j in range(i - 1):
                earlier = basis + (image * steps + j) * tokens
                cosine -= tl.load(earlier + column, mask=inside, other=0) * tl.load(earlier + pick)
            left = tl.max(tl.where(column == pick, value, float("-inf")), 0)
            left = tl.where(left == float("-inf"), 1.0, left)  # a first pick that is no candidate
            component = cosine * tl.where(left > LOW, 1 / tl.sqrt(tl.maximum(left, LOW)), 0.0)
            tl.store(basis + (image * steps + i - 1) * tokens + column, component, mask=inside)
            tl.debug_barrier()  # the next round reads what other threads wrote
            value = value - component * component
            value = tl.where((value > float("-inf")) & (value < LOW), 0.0, value)
        value = tl.where(column == pick, float("-inf"), value)
        pick = tl.minimum(tl.argmax(value, 0), tokens - 1).to(tl.int64)
        chosen = chosen | ((column == pick) & (count > i))
        tl.store(order + image * steps + i, pick)
    tl.store(picked + mine, chosen.to(tl.uint8), mask=inside)


def products_of(features: Tensor) -> Tensor:
    """`(images, tokens, tokens)` float32 dot products; those of half-precision features are exact up to their sum."""
    if features.is_cuda and features.dtype != torch.float32:
        return torch.bmm(features, features.transpose(1, 2), out_dtype=torch.float32)
    wide = features.float()
    return wide @ wide.transpose(1, 2)


def greedy(
    features: Tensor, first: Tensor, counts: Tensor, candidates: Tensor, objective: str, steps: int
) -> tuple[Tensor, Tensor]:
    single(features)
    images, tokens, _ = features.shape
    if tokens > GRAM_LIMIT:
        raise Refused(f"there are {tokens} tokens, and all dot products of {GRAM_LIMIT} are the most")
    order = first.new_zeros(images, steps)
    picked = torch.zeros(images, tokens, dtype=torch.bool, device=features.device)
    if steps == 0 or images == 0 or tokens == 0:
        return picked, order
    products, block = products_of(features), block_of(tokens)
    norm = torch.linalg.vector_norm(features, dim=-1, dtype=torch.float32)
    scale = norm.clamp(min=1e-12).reciprocal()
    basis = products.new_empty(images, steps if objective == "log_det" else 0, tokens)
    greedy_kernel[(images,)](
        products, scale, first.contiguous(), counts.long().contiguous(), candidates.contiguous().view(torch.uint8),
        picked.view(torch.uint8), order, basis, tokens, steps, LOW=floor(torch.float32), OBJECTIVE=objective,
        BLOCK=block, num_warps=warps(block),
    )  # fmt: skip
    return picked, order


@triton.jit
def scores_of(
    query, key, at, real, bias, row, column, rows, keys, dim, query_step, key_step, scale, window,
    CAUSAL: tl.constexpr, REAL: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    """A tile of scaled scores: what a row may not see is the lowest number, what is no key minus infinity."""
    d = tl.arange(0, DIM)
    q = tl.load(query + row[:, None] * query_step + d, mask=(row < rows)[:, None] & (d < dim), other=0)
    k = tl.load(key + column[:, None] * key_step + d, mask=(column < keys)[:, None] & (d < dim), other=0)
    # products of half-precision numbers are exact in float32; float32 must not become tf32
    if WIDE:
        q, k = q.to(tl.float32), k.to(tl.float32)
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if BIAS:
        score += tl.load(bias + column, mask=column < keys, other=0)[None]
    if CAUSAL:
        here = tl.load(at + row, mask=row < rows, other=0)[:, None]
        score = tl.where((column[None] <= here) & (column[None] > here - window), score, LOWEST)
    if REAL:
        score = tl.where((tl.load(real + column, mask=column < keys, other=0) != 0)[None], score, LOWEST)
    return tl.where((column < keys)[None], score, float("-inf"))


@triton.jit
def softmax_kernel(
    query, key, at, real, bias, top, total, rows, keys, dim, heads, group, query_batch, query_head, query_step,
    key_batch, key_head, key_step, scale, window, CAUSAL: tl.constexpr, REAL: tl.constexpr, BIAS: tl.constexpr,
    WIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The largest score of every row, and the sum of the exponentials below it, in one pass over the keys."""
    head, batch = (tl.program_id(1) % heads).to(tl.int64), (tl.program_id(1) // heads).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head // group * key_head
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    below = tl.zeros((ROWS,), tl.float32)
    for start in range(0, keys, KEYS):
        score = scores_of(
            query, key, at + batch * rows, real + batch * keys, bias + batch * keys, row, start + tl.arange(0, KEYS),
            rows, keys, dim, query_step, key_step, scale, window, CAUSAL, REAL, BIAS, WIDE, DIM,
        )  # fmt: skip
        now = tl.maximum(largest, tl.max(score, 1))
        below = below * tl.exp(largest - now) + tl.sum(tl.exp(score - now[:, None]), 1)
        largest = now
    out = (batch * heads + head) * rows + row
    tl.store(top + out, largest, mask=row < rows)
    tl.store(total + out, below, mask=row < rows)


@triton.jit
def mass_kernel(
    query, key, at, real, bias, weight, top, total, out, rows, keys, dim, heads, group, query_batch, query_head,
    query_step, key_batch, key_head, key_step, scale, window, CAUSAL: tl.constexpr, REAL: tl.constexpr,
    BIAS: tl.constexpr, WIDE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The weighted column sums of one head's attention for one block of keys, in one pass over the rows."""
    head, batch = (tl.program_id(1) % heads).to(tl.int64), (tl.program_id(1) // heads).to(tl.int64)
    column = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head // group * key_head
    mass = tl.zeros((KEYS,), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        score = scores_of(
            query, key, at + batch * rows, real + batch * keys, bias + batch * keys, row, column, rows, keys, dim,
            query_step, key_step, scale, window, CAUSAL, REAL, BIAS, WIDE, DIM,
        )  # fmt: skip
        mine = (batch * heads + head) * rows + row
        largest = tl.load(top + mine, mask=row < rows, other=0)
        share = tl.load(weight + batch * rows + row, mask=row < rows, other=0)
        share = share / tl.load(total + mine, mask=row < rows, other=1)
        mass += tl.sum(tl.exp(score - largest[:, None]) * share[:, None], 0)
    tl.store(out + (batch * heads + head) * keys + column, mass, mask=column < keys)


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
        raise Refused(f"heads have {dim} numbers, and 256 are the most")
    if 0 in (batch, rows, keys, heads):
        return query.new_zeros(batch, keys, dtype=torch.float32)
    kind = query.dtype if query.dtype == key.dtype else torch.float32
    query, key = (x.to(kind) if x.stride(-1) == 1 else x.to(kind).contiguous() for x in (query, key))
    weight = query.new_full((batch, rows), 1 / rows, dtype=torch.float32) if weight is None else weight.float()
    none = query.new_empty(0, dtype=torch.float32)
    seen = [
        none if at is None else at.expand(batch, -1).contiguous(),
        none if real is None else real.contiguous().view(torch.uint8),
        none if bias is None else bias.float().contiguous(),
    ]
    numbers = [rows, keys, dim, heads, heads // key.shape[1], *query.stride()[:3], *key.stride()[:3], float(scale)]
    numbers.append(window or rows + keys + 2**30)
    # few rows need no tall tiles, and wide ones must fit the memory of a processor
    size = {
        "ROWS": max(16, min(64, triton.next_power_of_2(rows))),
        "KEYS": 64 if dim <= 128 else 32,
        "DIM": max(16, triton.next_power_of_2(dim)),
    }
    size |= {"CAUSAL": at is not None, "REAL": real is not None, "BIAS": bias is not None}
    size["WIDE"] = kind == torch.bfloat16 and not query.is_cuda  # Triton's interpreter has no bfloat16 products
    top, total = query.new_empty(2, batch, heads, rows, dtype=torch.float32)
    softmax_kernel[(triton.cdiv(rows, size["ROWS"]), batch * heads)](query, key, *seen, top, total, *numbers, **size)
    mass = query.new_empty(batch, heads, keys, dtype=torch.float32)
    mass_kernel[(triton.cdiv(keys, size["KEYS"]), batch * heads)](
        query, key, *seen, weight.contiguous(), top, total, mass, *numbers, **size
    )
    return mass.mean(1)


@triton.jit
def merge_kernel(
    hidden, at, keep, entry, rows, weight, begin, end, out, tokens, entries, dim, hidden_sample, hidden_step, length,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    here = image * tokens + token
    part = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    if tl.load(keep + here) != 0:
        total = tl.zeros((BLOCK,), tl.float32)
        for e in range(tl.load(begin + here), tl.load(end + here)):
            mine = image * entries + tl.load(entry + image * entries + e)
            row = tl.load(rows + mine)
            source = hidden + row // length * hidden_sample + row % length * hidden_step
            total += tl.load(weight + mine) * tl.load(source + part, mask=part < dim, other=0).to(tl.float32)
        tl.store(out + tl.load(at + here) * dim + part, total.to(out.dtype.element_ty), mask=part < dim)


def merge(
    hidden: Tensor, at: Tensor, alive: Tensor, keep: Tensor, into: Tensor, weight: Tensor, source: Tensor | None
) -> Tensor:
    single(hidden)
    (images, tokens), (_, length, dim) = at.shape, hidden.shape
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format).copy_(hidden)
    if 0 in (images, tokens, dim):
        return out
    rows, weight = merge_weights(at, alive, weight, source, torch.float32)
    hidden = hidden if dim == 1 or hidden.stride(-1) == 1 else hidden.contiguous()
    # entries sorted by where they flow: each anchor sums its own, in the order of their numbers
    flow, entry = into.sort(dim=1, stable=True)
    token = torch.arange(tokens, device=at.device).expand(images, -1).contiguous()
    begin, end = torch.searchsorted(flow, token), torch.searchsorted(flow, token, right=True)
    block = min(1024, triton.next_power_of_2(max(dim, 16)))
    merge_kernel[(tokens, images, triton.cdiv(dim, block))](
        hidden, at.contiguous(), keep.contiguous().view(torch.uint8), entry, rows.contiguous(), weight.contiguous(),
        begin, end, out, tokens, into.shape[1], dim, hidden.stride(0), hidden.stride(1), length, BLOCK=block,
    )  # fmt: skip
    return out
