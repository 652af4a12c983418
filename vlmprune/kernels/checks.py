"""What the arguments of an op must be. A kernel that is handed anything else reads or writes where it must not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Refused", "check"]


class Refused(Exception):
    """Raised by an implementation for arguments that it does not have; other arguments may still go to it.

    Says nothing that changes from call to call: each text is told once.
    """


# Kinds of arguments that have passed: looking at them again costs more than starting a kernel.
passed: set[tuple] = set()
MOST_PASSED = 4096


def check(op: str, args: tuple) -> None:
    """Refuse arguments that an op does not have.

    Raises:
        ValueError: tensors on several devices, or a shape or a dtype that does not fit the others.
    """
    kind = (op, *[(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in args])
    if kind in passed:
        return
    check_all(op, args)
    if len(passed) >= MOST_PASSED:
        passed.clear()
    passed.add(kind)


def check_all(op: str, args: tuple) -> None:
    """Refuse arguments that an op does not have, whatever has passed before."""
    devices = {str(x.device) for x in args if isinstance(x, Tensor)}
    if len(devices) > 1:
        raise ValueError(f"vlmprune.{op}: tensors are on {' and '.join(sorted(devices))}: move them to one device.")
    for name, x, shape, dtypes in RULES[op](*args):
        if x is None:
            continue
        if not fits(tuple(x.shape), shape):
            raise ValueError(f"vlmprune.{op}: {name} is {tuple(x.shape)}, and {written(shape)} is needed.")
        if dtypes is not None and not dtypes(x.dtype):
            raise ValueError(f"vlmprune.{op}: {name} is {x.dtype}, and {dtypes.__name__} is needed.")


def fits(found: tuple[int, ...], wanted: tuple) -> bool:
    """Whether a shape is the wanted one; a size that is a tuple lists what is allowed, and None is anything."""
    return found == wanted or (
        len(found) == len(wanted)
        and all(w is None or (f in w if isinstance(w, tuple) else f == w) for f, w in zip(found, wanted, strict=True))
    )


def written(shape: tuple) -> str:
    """A wanted shape in words."""
    sizes = ["*" if w is None else " or ".join(map(str, w)) if isinstance(w, tuple) else str(w) for w in shape]
    return f"({', '.join(sizes)})"


def floats(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point


def integers(dtype: torch.dtype) -> bool:
    return dtype in (torch.int64, torch.int32)


def longs(dtype: torch.dtype) -> bool:
    return dtype == torch.int64


def bools(dtype: torch.dtype) -> bool:
    return dtype == torch.bool


def of_top_k(scores: Tensor, counts: Tensor, candidates: Tensor) -> list[tuple]:
    shape = tuple(scores.shape)
    many = tuple((1, n) for n in shape[:-1])
    return [
        ("scores", scores, shape, floats),
        ("counts", counts, many if counts.ndim == len(many) else (), integers),
        ("candidates", candidates, shape, bools),
    ]


def of_select_gather(
    scores: Tensor, counts: Tensor | None, real: Tensor | None, hidden: Tensor, ids: Tensor, cos: Tensor, sin: Tensor,
    *rest: Any,
) -> list[tuple]:  # fmt: skip
    batch, columns = scores.shape if scores.ndim == 2 else (None, None)
    axes = lambda x, inner: tuple(x.shape[:1]) if x.ndim == 3 + inner else ()  # noqa: E731
    return [
        ("scores", scores, (batch, columns), None),
        ("counts", counts, (batch,), integers),
        ("real", real, (batch, columns), bools),
        ("hidden", hidden, (batch, columns, None), floats),
        ("ids", ids, (*axes(ids, 0), batch, columns), integers),
        ("cos", cos, (*axes(cos, 1), batch, columns, None), floats),
        ("sin", sin, tuple(cos.shape), floats),
    ]


def of_greedy(features: Tensor, first: Tensor, counts: Tensor, candidates: Tensor, *rest: Any) -> list[tuple]:
    images, tokens = features.shape[:2] if features.ndim == 3 else (None, None)
    return [
        ("features", features, (images, tokens, None), floats),
        ("first", first, (images,), longs),
        ("counts", counts, (images,), integers),
        ("candidates", candidates, (images, tokens), bools),
    ]


def of_attention_mass(
    query: Tensor, key: Tensor, scale: float, at: Tensor | None, real: Tensor | None, window: int,
    weight: Tensor | None, bias: Tensor | None,
) -> list[tuple]:  # fmt: skip
    batch, heads, rows, dim = query.shape if query.ndim == 4 else (None,) * 4
    groups, keys = key.shape[1:3] if key.ndim == 4 else (None, None)
    if heads and groups and heads % groups:
        raise ValueError(f"vlmprune.attention_mass: {heads} query heads cannot be grouped over {groups} key heads.")
    if window and at is None:
        raise ValueError("vlmprune.attention_mass: a window needs `at`, the column of every row.")
    return [
        ("query", query, (batch, heads, rows, dim), floats),
        ("key", key, (batch, groups, keys, dim), floats),
        ("at", at, ((1, batch), rows), integers),
        ("real", real, ((1, batch), keys), bools),
        ("weight", weight, ((1, batch), rows), floats),
        ("bias", bias, ((1, batch), keys), floats),
    ]


def of_merge(
    hidden: Tensor, at: Tensor, alive: Tensor, keep: Tensor, into: Tensor, weight: Tensor, source: Tensor | None
) -> list[tuple]:
    images, tokens = at.shape if at.ndim == 2 else (None, None)
    entries = into.shape[-1] if source is not None and into.ndim else tokens
    return [
        ("hidden", hidden, (None, None, None), floats),
        ("at", at, (images, tokens), longs),
        ("alive", alive, (images, tokens), bools),
        ("keep", keep, (images, tokens), bools),
        ("into", into, (images, entries), longs),
        ("weight", weight, (images, entries), floats),
        ("source", source, (images, entries), longs),
    ]


RULES = {
    "top_k": of_top_k,
    "select_gather": of_select_gather,
    "greedy": of_greedy,
    "attention_mass": of_attention_mass,
    "merge": of_merge,
}
