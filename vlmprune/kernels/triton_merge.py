"""Weighted sums of tokens, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmprune.kernels.reference import merge_weights
from vlmprune.kernels.triton_common import single, start

__all__ = ["merge"]


@triton.jit(
    do_not_specialize=["tokens", "entries", "hidden_sample", "length", "all_rows"],
    do_not_specialize_on_alignment=["at", "keep", "rows", "weight"],
)
def merge_kernel(
    hidden, at, keep, entry, rows, weight, begin, end, out, tokens, entries, dim, hidden_sample, hidden_step, length,
    all_rows, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    here = image * tokens + token
    part = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    own = image * tokens
    within = (tl.load(begin + own) == 0) & (tl.load(end + own + tokens - 1) == entries)  # sorted: none before or after
    tl.device_assert(within, "into is no token")
    if tl.load(keep + here) != 0:
        total = tl.zeros((BLOCK,), tl.float32)
        last = tl.load(end + here).to(tl.int32)
        for e in range(tl.load(begin + here).to(tl.int32), last, AT_ONCE):
            some = e + tl.arange(0, AT_ONCE)
            mine = image * entries + tl.load(entry + image * entries + some, mask=some < last, other=0)
            row = tl.load(rows + mine, mask=some < last, other=0)
            tl.device_assert((row >= 0) & (row < all_rows), "at is no row")
            source = hidden + row // length * hidden_sample + row % length * hidden_step
            share = tl.load(weight + mine, mask=some < last, other=0)
            x = tl.load(source[:, None] + part[None], mask=(some < last)[:, None] & (part < dim)[None], other=0)
            total += tl.sum(share[:, None] * x.to(tl.float32), 0)
        to = tl.load(at + here)
        tl.device_assert((to >= 0) & (to < all_rows), "at is no row")
        tl.store(out + to * dim + part, total.to(out.dtype.element_ty), mask=part < dim)


def merge(
    hidden: Tensor, at: Tensor, alive: Tensor, keep: Tensor, into: Tensor, weight: Tensor, source: Tensor | None
) -> Tensor:
    single(hidden)
    (images, tokens), (batch, length, dim) = at.shape, hidden.shape
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format).copy_(hidden)
    if 0 in (images, tokens, dim):
        return out
    rows, weight = merge_weights(at, alive, weight, source, torch.float32)
    hidden = hidden if dim == 1 or hidden.stride(-1) == 1 else hidden.contiguous()
    # entries sorted by where they flow: each anchor sums its own
    flow, entry = into.sort(dim=1, stable=True)
    token = torch.arange(tokens, device=at.device).expand(images, -1).contiguous()
    begin, end = torch.searchsorted(flow, token), torch.searchsorted(flow, token, right=True)
    block = min(512, triton.next_power_of_2(max(dim, 16)))
    start(
        hidden.device, merge_kernel, (tokens, images, triton.cdiv(dim, block)), hidden, at.contiguous(),
        keep.contiguous().view(torch.uint8), entry, rows.contiguous(), weight.contiguous(), begin, end, out, tokens,
        into.shape[1], dim, hidden.stride(0), hidden.stride(1), length, batch * length, AT_ONCE=8, BLOCK=block,
    )  # fmt: skip
    return out
