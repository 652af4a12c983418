"""Greedy diversity in Triton: the whole loop in one launch over all dot products, or a launch per pick without."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmprune.kernels.choice import capturing
from vlmprune.kernels.precision import product
from vlmprune.kernels.reference import floor
from vlmprune.kernels.triton_common import LOWEST_KEY, MOST_COLUMNS, block_of, ordered, single, start

__all__ = ["greedy"]

STEP_BLOCK = 128  # tokens of a program of `greedy_step_kernel`
MANY_STEPS = 64  # of log_det: one program would read all earlier components at every pick
GIVEN = ["first", "counts", "candidates"]  # which may begin anywhere: they may be parts of what a caller has
ASK = 256 << 20  # bytes of dot products from which on free memory is looked at first


@triton.jit(do_not_specialize=["tokens", "image_step", "token_step"])
def hash_kernel(features, keys, tokens, dim, image_step, token_step, dim_step, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A number per row that equal rows share: a 64-bit sum, which does not depend on the order."""
    image = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.int64)
    for begin in range(0, dim, BLOCK):
        d = begin + tl.arange(0, BLOCK)
        at = features + image * image_step + row[:, None].to(tl.int64) * token_step + d[None] * dim_step
        x = tl.load(at, mask=(row < tokens)[:, None] & (d < dim)[None], other=0).to(tl.float32)
        bits = tl.where(x == 0.0, 0, x.to(tl.int32, bitcast=True))
        bits = (bits ^ (bits >> 15)).to(tl.int64)  # round numbers differ in their highest bits alone
        weight = (d.to(tl.int64) + 1) * 0x9E3779B97F4A7C1
        total += tl.sum(bits * (weight ^ (weight >> 23) | 1)[None], 1)
    tl.store(keys + image * tokens + row, total, mask=row < tokens)


@triton.jit(do_not_specialize=["tokens"])
def twin_kernel(keys, twins, tokens, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """For every row the first one that is equal to it. A matrix product may round equal rows apart."""
    image = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mine = tl.load(keys + image * tokens + row, mask=row < tokens, other=0)
    first = row
    for begin in range(0, (tl.program_id(0) + 1) * ROWS, BLOCK):
        other = begin + tl.arange(0, BLOCK)
        key = tl.load(keys + image * tokens + other, mask=other < tokens, other=0)
        same = (mine[:, None] == key[None]) & (other < tokens)[None]
        first = tl.minimum(first, tl.min(tl.where(same, other[None], tokens), 1))
    tl.store(twins + image * tokens + row, first, mask=row < tokens)


def twins_of(features: Tensor) -> Tensor:
    """`(images, tokens)` int32: for every row the first that is bitwise equal to it (`reference.first_of_equal`)."""
    images, tokens, dim = features.shape
    keys = torch.empty(images, tokens, dtype=torch.long, device=features.device)
    twins = torch.empty(images, tokens, dtype=torch.int32, device=features.device)
    start(features.device, hash_kernel, (triton.cdiv(tokens, 16), images), features, keys, tokens, dim,
          *features.stride(), ROWS=16, BLOCK=128)  # fmt: skip
    start(features.device, twin_kernel, (triton.cdiv(tokens, 64), images), keys, twins, tokens, ROWS=64, BLOCK=128)
    return twins


@triton.jit(do_not_specialize=["tokens", "steps"], do_not_specialize_on_alignment=GIVEN)
def greedy_kernel(
    products, scale, twins, first, counts, candidates, picked, order, basis, tokens, steps, LOW: tl.constexpr,
    OBJECTIVE: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """The whole loop over one image. Not HELD: what does not change is read again at every pick, to spare registers."""
    image = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside, own = column < tokens, image * tokens
    twin = tl.load(twins + own + column, mask=inside, other=0)
    scales = tl.load(scale + own + twin, mask=inside, other=0)
    may = tl.load(candidates + own + column, mask=inside, other=0) != 0
    begin = 0.0 if OBJECTIVE == "max_sum" else 1.0 if OBJECTIVE == "log_det" else float("inf")
    value = tl.where(may & inside, begin, float("-inf"))
    pick, count = tl.load(first + image), tl.load(counts + image)
    tl.device_assert((pick >= 0) & (pick < tokens), "first is no token")
    tl.store(picked + own + pick, 1, mask=count > 0)
    tl.store(order + image * steps, pick)
    for i in range(1, steps):
        if not HELD:
            twin = tl.load(twins + own + column, mask=inside, other=0)
            scales = tl.load(scale + own + twin, mask=inside, other=0)
        like = tl.load(twins + own + pick)
        row = tl.load(products + (own + like) * tokens + twin, mask=inside, other=0)
        cosine = row * scales * tl.load(scale + own + like)
        if OBJECTIVE == "max_sum":
            value = value - cosine
        elif OBJECTIVE == "max_min":
            value = tl.minimum(value, 1 - cosine, propagate_nan=tl.PropagateNan.ALL)
        else:
            for j in tl.range(0, i - 1, loop_unroll_factor=UNROLL):
                earlier = basis + (image * steps + j) * tokens
                cosine -= tl.load(earlier + column, mask=inside, other=0) * tl.load(earlier + pick)
            left = tl.sum(tl.where(column == pick, value, 0.0), 0)
            component = component_of(cosine, left, LOW)
            tl.store(basis + (image * steps + i - 1) * tokens + column, component, mask=inside)
            tl.debug_barrier()  # the next round reads what other threads wrote
            value = lowered(value, component, LOW)
        value = tl.where(column == pick, float("-inf"), value)
        pick = tl.argmax(tl.where(inside, ordered(value), LOWEST_KEY), 0).to(tl.int64)
        tl.store(picked + own + pick, 1, mask=count > i)
        tl.store(order + image * steps + i, pick)


@triton.jit
def component_of(residual, left, LOW: tl.constexpr):
    """What is along a pick, of cosines less what is along the ones before; `left`: its squared distance from them."""
    left = tl.where(left == float("-inf"), 1.0, left)  # a first pick that is no candidate
    return residual * tl.where(left > LOW, 1 / tl.sqrt(tl.maximum(left, LOW)), 0.0)


@triton.jit
def lowered(value, component, LOW: tl.constexpr):
    """Squared distances from the span of the picks after one more."""
    value = value - component * component
    return tl.where((value > float("-inf")) & (value < LOW), 0.0, value)


@triton.jit(
    do_not_specialize=["i", "tokens", "steps", "parts", "image_step", "token_step"],
    do_not_specialize_on_alignment=GIVEN,
)
def greedy_step_kernel(
    source, scale, twins, first, counts, candidates, value, best_key, best_at, picked, order, basis, i, tokens,
    steps, dim, parts, image_step, token_step, dim_step, LOW: tl.constexpr, OBJECTIVE: tl.constexpr, GRAM: tl.constexpr,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Finish pick i - 1, and prepare pick i: every program looks after a block of tokens.

    What programs tell each other lies in two turns, so that a launch reads only what the one before wrote.
    """
    part, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    images, own, now, last = tl.num_programs(1), image * tokens, i % 2, (i + 1) % 2
    if i == 1:
        pick = tl.load(first + image)
        tl.device_assert((pick >= 0) & (pick < tokens), "first is no token")
    else:
        other = tl.arange(0, PARTS)
        there = (last * images + image) * parts + other
        key = tl.load(best_key + there, mask=other < parts, other=LOWEST_KEY)
        at = tl.load(best_at + there, mask=other < parts, other=tokens)
        pick = tl.min(tl.where(key == tl.max(key, 0), at, tokens), 0).to(tl.int64)
    if part == 0:
        tl.store(order + image * steps + i - 1, pick)
        tl.store(picked + own + pick, 1, mask=tl.load(counts + image) >= i)
    if i < steps:
        column = part * BLOCK + tl.arange(0, BLOCK)
        inside = column < tokens
        like, twin = tl.load(twins + own + pick), tl.load(twins + own + column, mask=inside, other=0)
        if GRAM:
            row = tl.load(source + (own + like) * tokens + twin, mask=inside, other=0)
        else:
            row = tl.zeros((BLOCK,), tl.float32)
            mine = source + image * image_step
            for begin in range(0, dim, WIDE):
                d = begin + tl.arange(0, WIDE)
                theirs = tl.load(mine + like.to(tl.int64) * token_step + d * dim_step, mask=d < dim, other=0)
                at_all = mine + twin[:, None].to(tl.int64) * token_step + d[None] * dim_step
                x = tl.load(at_all, mask=inside[:, None] & (d < dim)[None], other=0)
                row += tl.sum(x.to(tl.float32) * theirs.to(tl.float32)[None], 1)
        scales = tl.load(scale + own + twin, mask=inside, other=0)
        cosine = row * scales * tl.load(scale + own + like)
        before = value + (last * images + image) * tokens
        if i == 1:
            may = tl.load(candidates + own + column, mask=inside, other=0) != 0
            begin_at = 0.0 if OBJECTIVE == "max_sum" else 1.0 if OBJECTIVE == "log_det" else float("inf")
            mine_now = tl.where(may, begin_at, float("-inf"))
        else:
            mine_now = tl.load(before + column, mask=inside, other=float("-inf"))
        if OBJECTIVE == "max_sum":
            mine_now = mine_now - cosine
        elif OBJECTIVE == "max_min":
            mine_now = tl.minimum(mine_now, 1 - cosine, propagate_nan=tl.PropagateNan.ALL)
        else:
            for j in tl.range(0, i - 1, loop_unroll_factor=8):
                earlier = basis + (image * steps + j) * tokens
                cosine -= tl.load(earlier + column, mask=inside, other=0) * tl.load(earlier + pick)
            left = 1.0
            if i > 1:
                left = tl.load(before + pick)
            component = component_of(cosine, left, LOW)
            tl.store(basis + (image * steps + i - 1) * tokens + column, component, mask=inside)
            mine_now = lowered(mine_now, component, LOW)
        mine_now = tl.where(column == pick, float("-inf"), mine_now)
        tl.store(value + (now * images + image) * tokens + column, mine_now, mask=inside)
        keys = tl.where(inside, ordered(mine_now), LOWEST_KEY)
        here = (now * images + image) * parts + part
        tl.store(best_key + here, tl.max(keys, 0))
        tl.store(best_at + here, part * BLOCK + tl.argmax(keys, 0))


def products_of(features: Tensor) -> Tensor:
    """`(images, tokens, tokens)` float32 dot products; those of half-precision features are exact up to their sum."""
    if features.is_cuda and features.dtype != torch.float32:
        return torch.bmm(features, features.transpose(1, 2), out_dtype=torch.float32)
    wide = features.float()
    return product(wide, wide.transpose(1, 2))


def products_that_fit(features: Tensor) -> Tensor | None:
    """All dot products, or None where the device has no room for them."""
    images, tokens, _ = features.shape
    if tokens > MOST_COLUMNS:
        return None
    if features.is_cuda and not capturing(features.device) and 4 * images * tokens * tokens > ASK:
        device = features.device
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if 4 * images * tokens * tokens > 0.8 * free:
            return None
    try:
        return products_of(features)
    except torch.OutOfMemoryError:
        return None


def greedy(
    features: Tensor, first: Tensor, counts: Tensor, candidates: Tensor, objective: str, steps: int
) -> tuple[Tensor, Tensor]:
    single(features)
    images, tokens, _ = features.shape
    order = first.new_zeros(images, steps)
    picked = torch.zeros(images, tokens, dtype=torch.bool, device=features.device)
    if steps == 0 or images == 0 or tokens == 0:
        return picked, order
    products, twins = products_that_fit(features), twins_of(features)
    norm = torch.linalg.vector_norm(features, dim=-1, dtype=torch.float32)
    scale = norm.clamp(min=1e-12).reciprocal()
    basis = scale.new_empty(images, steps if objective == "log_det" else 0, tokens)
    given = [scale, twins, first.contiguous(), counts.long().contiguous(), candidates.contiguous().view(torch.uint8)]
    made = [picked.view(torch.uint8), order, basis]
    if products is None or (objective == "log_det" and steps > MANY_STEPS):
        step_by_step(features if products is None else products, products is not None, given, made, objective, steps)
        return picked, order
    block = block_of(tokens)
    start(
        features.device, greedy_kernel, (images,), products, *given, *made, tokens, steps, LOW=floor(torch.float32),
        OBJECTIVE=objective, **greedy_size(block),
    )  # fmt: skip
    return picked, order


def greedy_size(block: int) -> dict[str, int]:
    """Options of a program that picks from `block` tokens: as many warps as there can be, since it has no company."""
    few = block <= 4096
    return {"BLOCK": block, "UNROLL": 8 if few else 1, "HELD": few, "num_warps": min(32, block // 128)}


def step_by_step(
    source: Tensor, gram: bool, given: list[Tensor], made: list[Tensor], objective: str, steps: int
) -> None:
    """Write the picks, one launch for each; `source` are dot products (`gram`) or features."""
    scale, (images, tokens) = given[0], given[0].shape
    parts = triton.cdiv(tokens, STEP_BLOCK)
    value = scale.new_empty(2, images, tokens)
    # each begins where memory does: no compiled kernel depends on how many there are
    best_key, best_at = (torch.empty(2, images, parts, dtype=torch.int32, device=scale.device) for _ in range(2))
    for i in range(1, steps + 1):
        start(
            scale.device, greedy_step_kernel, (parts, images), source, *given, value, best_key, best_at, *made, i,
            tokens, steps, 0 if gram else source.shape[-1], parts, *source.stride(), LOW=floor(torch.float32),
            OBJECTIVE=objective, GRAM=gram, BLOCK=STEP_BLOCK, PARTS=max(128, triton.next_power_of_2(parts)), WIDE=32,
            num_warps=4,
        )  # fmt: skip
