"""Inputs of the kernels' tests."""

from __future__ import annotations

import torch


def gather_inputs(batch, columns, dim, dtype, device, axes=0, rotary=6, seed=0, twisted=False):
    """Random rows, ids and rotary embeddings; `twisted` has none of them contiguous."""
    g = torch.Generator().manual_seed(seed)
    front = (axes,) if axes else ()
    hidden = torch.randn(batch, columns, dim, generator=g).to(dtype)
    ids = torch.randint(0, 4 * columns + 1, (*front, batch, columns), generator=g)
    cos, sin = torch.randn(2, *front, batch, columns, rotary, generator=g).to(dtype)
    if twisted:
        hidden = hidden.transpose(0, 1).contiguous().transpose(0, 1)
        ids = ids.new_zeros(*ids.shape[:-1], 2 * columns)[..., ::2].copy_(ids)
        cos = cos[..., :1, :, :].expand_as(cos)
        sin = sin.transpose(-1, -2).contiguous().transpose(-1, -2)
    return [x.to(device) for x in (hidden, ids, cos, sin)]


def merge_inputs(dtype, device="cpu", sparse=False, seed=0):
    """Two images of different size in three rows; what is gone or padding must not flow, whatever is said about it."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, 13, 2, 9, generator=g).to(dtype)[:, :, 0]  # not contiguous
    at = torch.stack([torch.randperm(13, generator=g)[:8] + 13 * row for row in (2, 0)])
    alive = torch.rand(2, 8, generator=g) < 0.8
    alive[:, [0, 7]] = True
    keep = alive & (torch.rand(2, 8, generator=g) < 0.5)
    keep[:, 7] = True
    anchors = [row.nonzero().flatten() for row in keep]
    entries = 11 if sparse else 8
    into = torch.stack([a[torch.randint(len(a), (entries,), generator=g)] for a in anchors])
    weight = torch.rand(2, entries, generator=g)
    source = torch.randint(8, (2, entries), generator=g) if sparse else None
    return [x if x is None else x.to(device) for x in (hidden, at, alive, keep, into, weight, source)]


def samples(grad=False):
    """Arguments of every op."""
    hidden, ids, cos, sin = gather_inputs(2, 7, 4, torch.float32, "cpu")
    keep = torch.tensor([[1, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1]]).bool()
    scores, counts = torch.randn(2, 7), torch.tensor([3, 2])
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
    at = torch.randint(7, (2, 5))
    merged = merge_inputs(torch.float32, sparse=True)
    if grad:
        hidden.requires_grad_()
        merged[0] = merged[0].contiguous().requires_grad_()
        merged[5].requires_grad_()
    return {
        "top_k": (scores, counts, keep),
        "select_gather": (keep, None, None, hidden, ids, cos, sin, 3, True),
        "select_gather, ranked": (scores, counts, ~keep, hidden, ids, cos, sin, 5, False),
        "greedy": (torch.randn(2, 7, 4), torch.tensor([0, 6]), counts, torch.ones(2, 7) > 0, "max_min", 3),
        "greedy, log_det": (torch.randn(2, 7, 4), torch.tensor([0, 6]), counts, keep, "log_det", 3),
        "attention_mass": (query, key, 0.5, None, None, 0, None, None),
        "attention_mass, masked": (query, key, 0.5, at, ~keep, 3, torch.rand(2, 5), torch.randn(2, 7)),
        "merge": tuple(merged),
    }
