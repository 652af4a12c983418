"""What a cut decided, looked at before the engine follows it: an author's mistake is named by method, place and field.

Types, shapes, dtypes and devices are known here; numbers are checked where the tensors are, so that nothing waits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vlmprune.engine.compile import place
from vlmprune.engine.finite import demand
from vlmprune.engine.plan import Plan
from vlmprune.kernels.checks import bools, floats, longs
from vlmprune.parts.cuts import AnyCut, Clusters, Merge, Pick, Reduction, Stay
from vlmprune.parts.options import is_whole

__all__ = [
    "check_clusters",
    "check_flow",
    "check_kept",
    "check_pick",
    "check_pixels",
    "check_reduction",
    "check_stay",
    "whose",
]


def whose(plan: Plan, cut: AnyCut) -> str:
    """The method of a cut and its place, as errors begin."""
    return next(f"{name}, {place(one)}" for name, one in plan.cuts if one is cut)


def check_type(where: str, decided: Any, wanted: type) -> None:
    """Refuse something else than what a place takes."""
    if not isinstance(decided, wanted):
        raise TypeError(f"{where}: reduce returned {type(decided).__name__}, and {wanted.__name__} is taken there.")


def check_tensor(
    where: str, name: str, value: Any, like: torch.Tensor, shape: tuple[int, ...], kind: Callable[[torch.dtype], bool]
) -> None:
    """Refuse what is no tensor of this shape and kind on the device of `like`."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{where}: reduce returned {name}={type(value).__name__}, which is no tensor.")
    if tuple(value.shape) != shape:
        raise ValueError(f"{where}: reduce returned {name} of shape {tuple(value.shape)}, and {shape} is needed.")
    if not kind(value.dtype):
        raise ValueError(f"{where}: reduce returned {name} of {value.dtype}, and {kind.__name__} are needed.")
    if value.device != like.device:
        raise ValueError(f"{where}: reduce returned {name} on {value.device}, and the tokens are on {like.device}.")


def check_counts(where: str, name: str, counts: Any, most: list[int]) -> None:
    """Refuse promised numbers of what stays that are none, or more than there is, image by image; None promises none.

    Inside a compiled graph the numbers may be symbols, which say nothing yet.
    """
    if counts is None or torch.compiler.is_compiling():
        return
    if not isinstance(counts, list) or not all(map(is_whole, counts)):
        raise TypeError(f"{where}: reduce returned {name}={counts!r}, which is no list of whole numbers.")
    if len(counts) != len(most) or any(count > limit for count, limit in zip(counts, most, strict=True)):
        raise ValueError(f"{where}: reduce returned {name}={counts}, and the images have {most}.")


def check_merge(where: str, merge: Any, like: torch.Tensor, tokens: int) -> None:
    """Refuse what is no `Merge` over the `(images, ...)` of `like`."""
    if merge is None:
        return
    if not isinstance(merge, Merge):
        raise TypeError(f"{where}: reduce returned merge={type(merge).__name__}, and Merge is taken there.")
    entries = tokens
    if merge.source is not None and isinstance(merge.into, torch.Tensor) and merge.into.ndim == 2:
        entries = merge.into.shape[1]
    shape = (len(like), entries)
    check_tensor(where, "merge.into", merge.into, like, shape, longs)
    check_tensor(where, "merge.weight", merge.weight, like, shape, floats)
    if merge.source is not None:
        check_tensor(where, "merge.source", merge.source, like, shape, longs)


def check_flow(where: str, merge: Merge, tokens: int) -> None:
    """Refuse numbers of tokens that there are not.

    Raises:
        ValueError: as `finite.demand`.
    """
    for name, numbers in (("merge.into", merge.into), ("merge.source", merge.source)):
        if numbers is not None:
            told = f"{where}: reduce returned {name} with numbers of tokens outside 0..{tokens - 1}."
            demand(((numbers >= 0) & (numbers < tokens)).all(), told)


def check_reduction(where: str, decided: Any, alive: torch.Tensor, tokens: list[int]) -> None:
    """Refuse what a `Cut` cannot have decided.

    Args:
        alive: `(images, tokens)` bool, the tokens that are left.
        tokens: how many these are, image by image.

    Raises:
        TypeError, ValueError: something else than a `Reduction`, or one whose fields do not fit the layout.
    """
    check_type(where, decided, Reduction)
    shape = tuple(alive.shape)
    check_tensor(where, "keep", decided.keep, alive, shape, bools)
    for name in ("scores", "soft"):
        if (value := getattr(decided, name)) is not None:
            check_tensor(where, name, value, alive, shape, floats)
    for name in ("counts", "patches"):
        check_counts(where, name, getattr(decided, name), tokens)
    check_merge(where, decided.merge, alive, shape[1])


def check_clusters(where: str, decided: Any, sizes: torch.Tensor) -> None:
    """Refuse what a `TowerCut` cannot have decided about `(views, tokens)` of these sizes.

    Raises:
        TypeError, ValueError: something else than `Clusters`, or clusters that these tokens do not make.
    """
    check_type(where, decided, Clusters)
    views, tokens = sizes.shape
    check_tensor(where, "into", decided.into, sizes, (views, tokens), longs)
    if not torch.compiler.is_compiling() and not is_whole(decided.count, 1, tokens):
        raise ValueError(f"{where}: reduce returned count={decided.count!r}, which is not one of 1..{tokens}.")
    into, count = decided.into, decided.count
    told = f"{where}: reduce returned into with numbers of clusters outside 0..{count - 1}."
    demand(((into >= 0) & (into < count)).all(), told)
    filled = torch.zeros_like(into).scatter(1, into, 1).sum(1)
    demand((filled == count).all(), f"{where}: reduce returned count={count}, and clusters without a token.")


def check_stay(where: str, decided: Stay, sizes: torch.Tensor) -> None:
    """Refuse what a `TowerCut` cannot keep of `(views, tokens)` of these sizes.

    Raises:
        TypeError, ValueError: fields that do not fit these tokens, or a view of which nothing stays.
    """
    shape = tuple(sizes.shape)
    if decided.scores is not None:
        check_tensor(where, "scores", decided.scores, sizes, shape, floats)
    if decided.keep is None:
        return
    check_tensor(where, "keep", decided.keep, sizes, shape, bools)
    kept = (decided.keep & (sizes > 0)).sum(1)
    demand((kept > 0).all(), f"{where}: reduce returned keep without a token of some view.")
    if decided.count is not None:
        if not torch.compiler.is_compiling() and not is_whole(decided.count, 1, shape[1]):
            raise ValueError(f"{where}: reduce returned count={decided.count!r}, which is not one of 1..{shape[1]}.")
        told = f"{where}: reduce returned count={decided.count}, and keep of another number of tokens."
        demand((kept == decided.count).all(), told)


def check_pick(where: str, decided: Any, features: torch.Tensor, has_cls: bool) -> None:
    """Refuse what a `ProjectorCut` cannot have decided about `(views, tokens, dim)`.

    Raises:
        TypeError, ValueError: something else than a `Pick`, or one whose fields do not fit the features.
    """
    check_type(where, decided, Pick)
    views, tokens, _ = features.shape
    check_tensor(where, "keep", decided.keep, features, (views, tokens - int(has_cls)), bools)
    check_merge(where, decided.merge, features, tokens)
    if decided.merge is not None:
        check_flow(where, decided.merge, tokens)
    if decided.mix is not None:
        patches = tokens - int(has_cls)
        check_tensor(where, "mix", decided.mix, features, (views, patches, patches), floats)
        if decided.merge is not None:
            raise ValueError(f"{where}: reduce returned merge and mix, of which one is taken.")


def check_kept(where: str, keep: Any, pixels: torch.Tensor) -> None:
    """Refuse what a `PatchCut` cannot have kept of `(tokens, numbers)`.

    Raises:
        TypeError, ValueError: no tensor, one of another shape, dtype or device, or one that keeps nothing.
    """
    check_tensor(where, "keep", keep, pixels, (len(pixels),), bools)
    demand(keep.any(), f"{where}: reduce kept nothing.")


def check_pixels(where: str, changed: Any, pixels: torch.Tensor) -> None:
    """Refuse what cannot take the place of a tower's pixels.

    Raises:
        TypeError, ValueError: no tensor, or one of another shape, dtype or device.
    """
    check_tensor(where, "pixels", changed, pixels, tuple(pixels.shape), floats)
    if changed.dtype != pixels.dtype:
        raise ValueError(f"{where}: reduce returned pixels of {changed.dtype}, and they were {pixels.dtype}.")
