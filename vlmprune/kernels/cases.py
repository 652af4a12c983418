"""Small cases of every op that a device has to get right before it is trusted: `trial.py` runs them, and the tests do.

Sizes are small, configurations are those of real use: every block size and number of warps that a kernel is launched
with, every dtype, every combination of masks that the package uses.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["CASES", "difference"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SPECIAL = (float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1e-7, -1e-7, 65504.0)
# one for every block size of the Triton kernels, with an odd one in each, and one that CUDA C++ chooses once for
COLUMNS = (1, 700, 1999, 4096, 8191, 9000)
Case = tuple[str, tuple]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chance(share: float, *shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def scores_of(rows: int, columns: int) -> Tensor:
    """Many ties, and everything that a float can be."""
    scores = (random(rows, columns) * 3).round() / 2
    special = torch.tensor(SPECIAL)[torch.arange(rows * columns).view(rows, columns) % len(SPECIAL)]
    return torch.where(chance(0.3, rows, columns, seed=1), special, scores)


def spread(x: Tensor) -> Tensor:
    """The same values at odd offsets and steps."""
    wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 1)
    wide[..., 1::2] = x
    return wide[..., 1::2]


def of_top_k() -> Iterator[Case]:
    for columns in COLUMNS:
        among = chance(0.7, 5, columns, seed=2)
        counts = torch.tensor([0, 1, columns // 3, columns, columns + 5])
        for dtype in FLOATS if columns == 700 else FLOATS[:1]:
            yield f"{columns} columns, {dtype}", (scores_of(5, columns).to(dtype), counts, among)
    yield "odd steps", (spread(scores_of(2, 300)), torch.tensor([7, 100]), spread(chance(0.5, 2, 300)))


def rows_of(batch: int, columns: int, dim: int, dtype: torch.dtype, axes: int) -> tuple[Tensor, ...]:
    shape = (axes,) * bool(axes) + (batch, columns)
    hidden, rotary = random(batch, columns, dim).to(dtype), random(2, *shape, 10).to(dtype)
    return hidden, torch.arange(columns).expand(shape).contiguous(), rotary[0], rotary[1]


def of_select_gather() -> Iterator[Case]:
    for columns in COLUMNS:
        real, counts = chance(0.8, 2, columns, seed=3), torch.tensor([columns // 5, columns])
        marked = chance(0.3, 2, columns, seed=4)
        for dtype in FLOATS if columns == 700 else FLOATS[:1]:
            given = rows_of(2, columns, 24, dtype, 0)
            yield f"{columns} columns, {dtype}, ranked", (scores_of(2, columns), counts, real, *given, columns, False)
        length = int((marked & real).sum(1).max())
        given = rows_of(2, columns, 7, torch.float32, 3)  # rows that no wide access fits
        yield f"{columns} columns, marked", (marked, None, real, *given, length, True)
        for dtype in FLOATS:  # what a model has: rows that begin where wide accesses do
            hidden, ids, cos, _ = rows_of(2, columns, 64, dtype, 0)
            cos, none = hidden[..., :32].contiguous(), cos[..., :0]
            yield f"{columns} columns, {dtype}, original", (marked, None, None, hidden, ids, cos, cos, columns, False)
            yield f"{columns} columns, {dtype}, closed", (marked, None, real, hidden, ids, none, none, columns, True)
    hidden, ids, cos, sin = rows_of(2, 300, 16, torch.bfloat16, 0)
    given = (spread(hidden.transpose(1, 2)).transpose(1, 2), spread(ids), cos, sin)
    yield "odd steps, nothing padded", (spread(marked[:, :300]), None, None, *given, 290, True)
    yield "nothing stays", (marked[:, :300] & False, None, None, *given, 0, True)


def signs(images: int, tokens: int, dim: int) -> Tensor:
    """Features of ±1 in 4^n dimensions: all cosines are exact, with many ties; a third of the rows are duplicates."""
    features = random(images, tokens, dim).sign()
    features[:, ::3] = features[:, :1].clone()
    return features


def of_greedy() -> Iterator[Case]:
    for tokens in (1, 700, 1999, 4096, 5000, 16384, 17000):
        dim, few = (64, 9) if tokens < 6000 else (16, 4)
        images = 2 if tokens < 6000 else 1
        first, counts = torch.tensor([0, tokens - 1])[:images], torch.tensor([min(few, tokens), 1])[:images]
        for objective in ("max_min", "max_sum"):
            for dtype in FLOATS if tokens in (700, 17000) else FLOATS[:1]:
                features, among = signs(images, tokens, dim).to(dtype), chance(0.7, images, tokens)
                among[:, 0] = True
                steps = int(counts.max())
                yield f"{objective}, {tokens} tokens, {dtype}", (features, first, counts, among, objective, steps)
        features = random(images, tokens, dim, seed=5)
        every = torch.ones(images, tokens, dtype=torch.bool)
        yield f"log_det, {tokens} tokens", (features, first, counts, every, "log_det", int(counts.max()))
    features, every = random(1, 200, 128, seed=6), torch.ones(1, 200, dtype=torch.bool)
    yield "log_det, 70 picks", (features, torch.tensor([9]), torch.tensor([70]), every, "log_det", 70)
    features = random(1, 40, 16)
    features[0, 7, 3] = float("nan")
    for objective in ("max_min", "max_sum", "log_det"):
        every, first = torch.ones(1, 40, dtype=torch.bool), torch.tensor([3])
        yield f"{objective}, NaN", (features, first, torch.tensor([5]), every, objective, 5)


def of_attention_mass() -> Iterator[Case]:
    at, real = (torch.arange(70) + 80).expand(2, -1), chance(0.8, 2, 150)
    real[1, :90] = False  # rows that see nothing
    for dim in (64, 72, 128, 256):
        for dtype in FLOATS:
            query, key = random(2, 70, 4, dim).to(dtype), random(2, 150, 2, dim, seed=1).to(dtype)
            query, key = query.transpose(1, 2), key.transpose(1, 2)  # heads are split off a projection
            if dim == 64:
                key = key.mT.contiguous().mT
            what, last = f"{dim} per head, {dtype}", query[:, :, -1:]
            if dim != 256:  # of towers
                yield what, (query, key, 0.1, None, None, 0, None, None)
                yield f"{what}, one row", (last, key, 0.1, None, None, 0, None, None)
            if dim != 72:  # of language models
                yield f"{what}, causal", (query, key, 0.1, at, real, 0, None, None)
                yield f"{what}, causal, one row", (last, key, 0.1, at[:, -1:], None, 0, None, None)
    weight, bias = random(2, 70).abs(), random(2, 150)
    bias[0, :64] = -torch.inf  # a whole tile
    bias[1] += 100  # beyond what an exponential holds
    query, key = random(2, 2, 70, 64), random(2, 1, 150, 64, seed=1)
    yield "bias alone", (query, key, 0.1, None, None, 0, weight, bias)
    yield "all masks", (query, key, 0.1, at, real, 9, weight, bias)
    query = query.clone()
    query[0, 0, 3, 5], query[1, 1, 4, 2] = float("nan"), float("inf")
    yield "NaN and infinity", (query, key, 0.1, at, None, 0, weight, None)


def of_merge() -> Iterator[Case]:
    for dtype in FLOATS:
        for dim in (24, 1536):
            at = torch.arange(40).view(2, 20) + torch.tensor([[2], [7]])
            alive, keep = chance(0.8, 2, 20), chance(0.4, 2, 20, seed=1)
            keep[:, 0] = alive[:, 0] = True
            keep &= alive
            into = torch.where(keep, torch.arange(20), 0)
            entries = torch.arange(60).view(2, 30) % 20
            weight = random(2, 30).abs()
            hidden = random(2, 30, dim).to(dtype)
            yield f"{dtype}, {dim}", (hidden, at, alive, keep, into, weight[:, :20].contiguous(), None)
            sparse = (into.gather(1, entries), weight, entries)
            yield f"{dtype}, {dim}, entries", (spread(hidden.mT).mT, at, alive, keep, *sparse)


CASES = {
    "top_k": of_top_k,
    "select_gather": of_select_gather,
    "greedy": of_greedy,
    "attention_mass": of_attention_mass,
    "merge": of_merge,
}
EPSILON = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def difference(op: str, args: tuple, got: object, expected: object) -> str | None:
    """How a result differs from the plain one, or None. Sums may be rounded differently, everything else is exact."""
    pairs = list(zip(*[(x,) if isinstance(x, Tensor) else x for x in (got, expected)], strict=True))
    if op == "greedy":  # an order is arbitrary past its count
        inside = torch.arange(pairs[1][1].shape[1]) < args[2].cpu()[:, None]
        pairs[1] = tuple(torch.where(inside, x.cpu(), 0) for x in pairs[1])
    for i, (mine, theirs) in enumerate(pairs):
        mine, theirs = mine.detach().cpu(), theirs.detach().cpu()
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            return f"output {i} is {mine.dtype} {tuple(mine.shape)}, not {theirs.dtype} {tuple(theirs.shape)}"
        allowed = EPSILON[theirs.dtype] if op in ("attention_mass", "merge") else 0.0
        if told := first_apart(mine, theirs, allowed):
            return f"output {i} {told}"
    return None


def first_apart(mine: Tensor, theirs: Tensor, allowed: float) -> str | None:
    """Where two outputs of one shape are further apart than allowed; None if nowhere."""
    apart = ~torch.isclose(mine.double(), theirs.double(), rtol=allowed, atol=allowed, equal_nan=True)
    if not apart.any():
        return None
    at = tuple(apart.nonzero()[0].tolist())
    return (
        f"differs in {int(apart.sum())} of {apart.numel()} places, first at {at}: "
        f"{mine[at].item()} instead of {theirs[at].item()}"
    )
