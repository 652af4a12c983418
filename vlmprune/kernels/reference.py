"""The plain torch implementations: what every other one is tested against, and what runs on a CPU."""

from __future__ import annotations

import torch
from torch.nn import functional

from vlmprune.kernels.precision import product

__all__ = [
    "attention_mass",
    "by_key_head",
    "empty_gather",
    "greedy",
    "merge",
    "merge_weights",
    "select_gather",
    "top_k",
    "upcast",
    "visible_keys",
]

CHUNK = 128  # query rows whose scores exist at one time
# From one pick in so many tokens on, all cosines at once are cheaper than a row of them per pick; rows are cheap while
# the features that each of them reads stay in a processor's last cache.
GRAM_SHARE = {"cached": 5, "streamed": 16}
CACHE = 16 << 20  # bytes
GRAM_LIMIT = 8192  # tokens of which all cosines may exist at one time


def upcast(x: torch.Tensor) -> torch.Tensor:
    """Float32, or float64 where the model computes in it."""
    return x if x.dtype == torch.float64 else x.float()


def top_k(scores: torch.Tensor, counts: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    order = scores.masked_fill(~candidates, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    # a NaN sorts first and an excluded token ties with a score of -inf: rank candidates alone, whatever they score
    order = order.gather(-1, (~candidates).gather(-1, order).sort(dim=-1, stable=True).indices)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return (rank < counts[..., None]) & candidates


def select_gather(
    scores: torch.Tensor,
    counts: torch.Tensor | None,
    real: torch.Tensor | None,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    length: int,
    contiguous: bool,
) -> tuple[torch.Tensor, ...]:
    among = torch.ones_like(scores, dtype=torch.bool) if real is None else real
    kept = scores & among if counts is None else top_k(scores, counts, among)
    batch, columns = kept.shape
    rank, total = kept.cumsum(1), kept.sum(1, keepdim=True)
    column = torch.arange(columns, device=kept.device)
    # kept columns fill the right end in order, the last of the others the padding before them
    slot = torch.where(kept, length - total + rank - 1, column - rank - (columns - length))
    index = rank.new_zeros(batch, length + 1)
    index = index.scatter_(1, torch.where(slot < 0, length, slot), column.expand(batch, -1))[:, :length]
    dropped = among & ~kept
    row = torch.arange(batch, device=kept.device)[:, None]
    ids = take(ids, row, index, 0)
    if contiguous:
        ids = (ids - dropped.cumsum(1).gather(1, index)).clamp(min=0)
    mask = torch.arange(length, device=kept.device) >= length - total
    return hidden[row, index], ids, take(cos, row, index, 1), take(sin, row, index, 1), index.clone(), mask, \
        dropped.sum(1)  # fmt: skip


def empty_gather(
    scores: torch.Tensor, hidden: torch.Tensor, ids: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, length: int
) -> tuple[torch.Tensor, ...]:
    """Uninitialised results of `select_gather`."""
    batch = scores.shape[0]
    return (
        hidden.new_empty((batch, length, hidden.shape[-1])),
        ids.new_empty((batch, length) if ids.ndim == 2 else (ids.shape[0], batch, length)),
        empty_rotary(cos, batch, length),
        empty_rotary(sin, batch, length),
        scores.new_empty((batch, length), dtype=torch.long),
        scores.new_empty((batch, length), dtype=torch.bool),
        scores.new_empty((batch,), dtype=torch.long),
    )


def empty_rotary(x: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """Room for `length` columns of a rotary embedding, with or without axes."""
    inner = x.shape[-1]
    return x.new_empty((batch, length, inner) if x.ndim == 3 else (x.shape[0], batch, length, inner))


def take(x: torch.Tensor, row: torch.Tensor, index: torch.Tensor, inner: int) -> torch.Tensor:
    """Columns `index` `(batch, length)` of `([axes,] batch, columns)` and `inner` more dimensions."""
    return x[:, row, index] if x.ndim == 3 + inner else x[row, index]


def greedy(
    features: torch.Tensor,
    first: torch.Tensor,
    counts: torch.Tensor,
    candidates: torch.Tensor,
    objective: str,
    steps: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    x = upcast(features)
    twin, x = first_of_equal(x), functional.normalize(x, dim=-1)
    images, tokens, _ = x.shape
    order = first.new_zeros(images, steps)
    picked = torch.zeros(images, tokens, dtype=torch.bool, device=x.device)
    if steps == 0 or images == 0 or tokens == 0:
        return picked, order
    row = torch.arange(images, device=x.device)
    share = GRAM_SHARE["cached" if x.nbytes <= CACHE else "streamed"]
    cosines = gram(x) if steps * share >= tokens and tokens <= GRAM_LIMIT else None
    value = x.new_full((images, tokens), {"max_sum": 0.0, "max_min": torch.inf, "log_det": 1.0}[objective])
    value = value.masked_fill_(~candidates, -torch.inf)  # a token that may not be picked (any more)
    basis = x.new_zeros(images, steps if objective == "log_det" else 0, tokens)
    pick = order[:, 0] = first
    for i in range(1, steps):
        like = twin[row, pick]
        cosine = product(x, x[row, like, :, None]).squeeze(-1) if cosines is None else cosines[row, like]
        value = after_pick(objective, value, cosine.gather(1, twin), basis[:, :i], pick, twin)
        value.scatter_(1, pick[:, None], -torch.inf)
        pick = order[:, i] = value.argmax(1)
    inside = torch.arange(steps, device=x.device) < counts[:, None]
    # an order past the image's count goes to one spare column
    spare = torch.zeros(images, tokens + 1, dtype=torch.bool, device=x.device)
    return spare.scatter_(1, torch.where(inside, order, tokens), True)[:, :tokens].clone(), order


def after_pick(
    objective: str,
    value: torch.Tensor,
    cosine: torch.Tensor,
    basis: torch.Tensor,
    pick: torch.Tensor,
    twin: torch.Tensor,
) -> torch.Tensor:
    """What tokens are worth after a pick, which `cosine` is to, `(images, tokens)`; `basis` ends with its row."""
    if objective == "max_sum":
        return value.sub_(cosine)
    if objective == "max_min":
        return torch.minimum(value, 1 - cosine)
    value = value - project(cosine, basis[:, :-1], pick, value, twin, basis[:, -1])
    return torch.where((value > -torch.inf) & (value < floor(value.dtype)), 0, value)


def first_of_equal(x: torch.Tensor) -> torch.Tensor:
    """`(images, tokens)` long: for every row of `(images, tokens, dim)` the first one that is bitwise equal to it.

    A matrix product may give equal rows values that differ in the last bit, by where they stand in its blocks, and ties
    between them would not go to the lower index. Rows are compared by a 64-bit sum that does not depend on the order.
    """
    x = (x + 0.0).contiguous()  # -0.0 is 0.0
    if x.dtype == torch.float32:  # two values make a word
        x = functional.pad(x, (0, x.shape[-1] % 2))
    words = x.view(torch.int64)
    words = words ^ (words >> 29)  # round numbers differ in their highest bits alone, which a product would push out
    weight = torch.arange(1, words.shape[-1] + 1, device=x.device) * 0x9E3779B97F4A7C1
    key, index = (words * (weight ^ (weight >> 23) | 1)).sum(-1).sort(dim=-1, stable=True)
    place = torch.arange(x.shape[1], device=x.device).expand_as(index)
    same = functional.pad(key[:, 1:] == key[:, :-1], (1, 0))
    start = place.masked_fill(same, 0).cummax(-1).values
    return torch.empty_like(index).scatter_(-1, index, index.gather(-1, start))


def gram(x: torch.Tensor, block: int = 256) -> torch.Tensor:
    """All cosines of `(..., tokens, dim)` unit vectors; symmetric, so the lower half is a copy."""
    tokens = x.shape[-2]
    out = x.new_empty(*x.shape[:-1], tokens)
    for start in range(0, tokens, block):
        end = start + block
        part = product(x[..., start:end, :], x[..., start:, :].mT)
        out[..., start:end, start:] = part
        out[..., start:, start:end] = part.mT
    return out


def floor(dtype: torch.dtype) -> float:
    """Squared distance from the span of the picks under which a unit vector counts as inside it."""
    return 1e-10 if dtype == torch.float64 else 1e-5


def project(
    cosine: torch.Tensor,
    basis: torch.Tensor,
    pick: torch.Tensor,
    value: torch.Tensor,
    twin: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """One step of the incremental Cholesky factorisation: what the last pick takes from every squared distance.

    Args:
        cosine: `(images, tokens)` to the pick.
        basis: `(images, i, tokens)` components along the picks before it.
        pick: `(images,)`; value: `(images, tokens)` squared distances from their span.
        twin: `(images, tokens)` first of equal tokens, whose sums may be rounded apart by where they stand.
        out: `(images, tokens)`, gets the components along this pick.
    """
    own = basis.gather(2, pick[:, None, None].expand(-1, basis.shape[1], 1))
    left = value.gather(1, pick[:, None])
    # a first pick may be no candidate; its distance is that of a unit vector
    left = torch.where(left == -torch.inf, 1, left)
    component = (cosine - (basis * own).sum(1)) * torch.where(left > floor(value.dtype), left, torch.inf).rsqrt()
    out.copy_(component.gather(1, twin))
    return out.square()


def visible_keys(at: torch.Tensor | None, real: torch.Tensor | None, window: int, keys: int) -> torch.Tensor | None:
    """`(batch, rows, keys)` bool of the keys that query rows may see, None for all.

    Args:
        at: `(batch, rows)` long, the column of every row where attention is causal.
        real: `(batch, keys)` bool, keys that are no padding.
        window: columns that a row sees backwards, itself included; 0 for all. Needs `at`.
    """
    if at is None:
        return None if real is None else real[:, None]
    column = torch.arange(keys, device=at.device)
    visible = column <= at[..., None]
    if real is not None:
        visible = visible & real[:, None]
    return visible & (column > at[..., None] - window) if window else visible


def by_key_head(query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries `(batch, key heads, heads of one, rows, dim)` and keys `(batch, key heads, 1, dim, keys)`, in float32."""
    query, key = upcast(query), upcast(key)
    return query.unflatten(1, (key.shape[1], query.shape[1] // key.shape[1])), key[:, :, None].transpose(-1, -2)


def attention_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    at: torch.Tensor | None,
    real: torch.Tensor | None,
    window: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    batch, _, rows, _ = query.shape
    keys = key.shape[2]
    query, key = by_key_head(query, key)
    weight = query.new_full((batch, rows), 1 / max(rows, 1)) if weight is None else weight.to(query.dtype)
    mass = query.new_zeros(batch, keys)
    for start in range(0, rows, CHUNK):
        part = slice(start, start + CHUNK)
        logits = product(query[:, :, :, part], key) * scale
        if bias is not None:
            logits = logits + bias[:, None, None, None].to(logits.dtype)
        visible = visible_keys(None if at is None else at[:, part], real, window, keys)
        if visible is not None:
            logits = logits.masked_fill(~visible[:, None, None], torch.finfo(logits.dtype).min)
        mean = logits.softmax(-1).mean((1, 2))
        mass += (mean * weight[:, part, None]).sum(1)
    return mass


def merge_weights(
    at: torch.Tensor, alive: torch.Tensor, weight: torch.Tensor, source: torch.Tensor | None, wide: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(images, entries)` flat row that every entry reads, and its weight (0 where a token takes no part)."""
    if source is not None:
        at, alive = at.gather(1, source), alive.gather(1, source)
    return at, torch.where(alive, weight, 0).to(wide)


def merge(
    hidden: torch.Tensor,
    at: torch.Tensor,
    alive: torch.Tensor,
    keep: torch.Tensor,
    into: torch.Tensor,
    weight: torch.Tensor,
    source: torch.Tensor | None,
) -> torch.Tensor:
    flat = hidden.flatten(0, 1)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    rows, weight = merge_weights(at, alive, weight, source, wide)
    parts = flat[rows].to(wide) * weight[..., None]
    merged = parts.new_zeros(*at.shape, hidden.shape[-1])
    merged = merged.scatter_add(1, into[..., None].expand_as(parts), parts).to(hidden.dtype)
    # entries that are no anchor write to one spare row, so that no mask has to be read back
    target = torch.where(keep, at, flat.shape[0])
    spare = torch.cat((flat, flat.new_zeros(1, flat.shape[1]))).index_put((target.flatten(),), merged.flatten(0, 1))
    return spare[:-1].view_as(hidden)
