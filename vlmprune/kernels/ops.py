"""The custom ops: their schemas, what they compute, their shapes, their gradients and their FLOPs.

Call them as `torch.ops.vlmprune.<name>`. None of them waits for the device, and none returns an alias of an argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, infer_schema
from torch.utils.flop_counter import register_flop_formula

from vlmprune.kernels.choice import OPS, run
from vlmprune.kernels.reference import empty_gather, merge_weights

__all__ = ["OPS", "call"]

library = Library("vlmprune", "DEF")
functions: dict[str, Callable] = {}


def define(function: Callable) -> Callable:
    """Register an op that writes to none of its arguments, by its type hints.

    As `torch.library.custom_op` does, whose layers of Python cost more at every call than the launch of a kernel.
    """
    name = function.__name__
    library.define(name + infer_schema(function, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, function, "CompositeExplicitAutograd")
    return functions.setdefault(name, function)


def fake(name: str) -> Callable:
    """Register what an op returns for tensors without values."""
    return torch.library.register_fake(f"vlmprune::{name}", lib=library)


# Arguments that are nothing but themselves: no subclass that answers for an operation.
PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None), int, bool, float, str})


def nobody_listens() -> bool:
    """Whether nothing rides on torch's operations here: gradients, a compiler, a mode, a transform or a profiler."""
    return not (
        torch.is_grad_enabled()
        or torch.autograd.forward_ad._current_level >= 0  # which `no_grad` leaves on
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack()
        or torch._C._get_tracing_state()
        or torch.autograd._profiler_enabled()
        or torch.autograd.profiler._is_profiler_enabled  # another thread's, of all threads
    )


def values_lie_there(args: tuple) -> bool:
    """Whether what the tensors' memory holds is their values: not for one that has none, nor for one to be negated."""
    for x in args:  # noqa: SIM110 - a generator takes twice as long
        if isinstance(x, Tensor) and (x.is_meta or x.is_neg()):
            return False
    return True


def call(name: str, *args: Any) -> Any:
    """Call an op, past torch's dispatcher where that would find nothing to do.

    Finding out takes the dispatcher longer than starting a kernel. The result is that of `torch.ops.vlmprune.<name>`.
    """
    if nobody_listens() and PLAIN.issuperset(map(type, args)) and values_lie_there(args):
        return functions[name](*args)
    return getattr(torch.ops.vlmprune, name)(*args)


@define
def top_k(scores: Tensor, counts: Tensor, candidates: Tensor) -> Tensor:
    """Mark the `counts` best candidates of every row; ties go to the lower index, a NaN is above everything.

    Args:
        scores: `(..., tokens)` float.
        counts: `(...)` long; a row with fewer candidates keeps them all.
        candidates: `(..., tokens)` bool.

    Returns:
        `(..., tokens)` bool.
    """
    return run("top_k", scores, counts, candidates)


@fake("top_k")
def _(scores: Tensor, counts: Tensor, candidates: Tensor) -> Tensor:
    return torch.empty_like(candidates, memory_format=torch.contiguous_format)


@define
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Choose columns of every sample and gather all that belongs to them into a left-padded shorter batch.

    Args:
        scores: `(batch, columns)`; float with `counts`, or bool that marks the columns to keep.
        counts: `(batch,)` long, how many of the best-scored columns stay (order as in `top_k`; give text an infinite
            score to keep it). None for bool scores.
        real: `(batch, columns)` bool, columns that are no padding; None if all are.
        hidden: `(batch, columns, dim)`.
        ids: `(batch, columns)` or `(axes, batch, columns)` position ids.
        cos, sin: `(batch, columns, n)` or `(axes, batch, columns, n)`; n may be 0.
        length: columns of the result, at most those of `scores` and at least as many as any sample keeps.
        contiguous: lower every position id by the number of real columns dropped before it.

    Returns:
        hidden, ids, cos and sin at the new length, kept columns at the right end in their order; `(batch, length)` long
        column that every entry comes from (a padding entry comes from a column that is not kept); `(batch, length)`
        bool of entries that are no padding; `(batch,)` long number of real columns dropped.
    """
    if not 0 <= length <= scores.shape[1]:
        raise ValueError(f"length={length} must be between 0 and the {scores.shape[1]} columns there are.")
    if (counts is None) != (scores.dtype == torch.bool):
        raise ValueError(f"scores are {scores.dtype}: float scores need counts, bool ones mark what stays without any.")
    return run("select_gather", scores, counts, real, hidden, ids, cos, sin, length, contiguous)


@fake("select_gather")
def _(scores, counts, real, hidden, ids, cos, sin, length, contiguous):
    return empty_gather(scores, hidden, ids, cos, sin, length)


def keep_index(ctx, inputs, output) -> None:
    _, _, _, hidden, _, cos, sin, _, _ = inputs
    ctx.save_for_backward(output[4])
    ctx.shapes = [x.shape for x in (hidden, cos, sin)]


def spread_gradients(ctx, hidden, ids, cos, sin, *rest):
    """Every column came at most once: gradients go back to where their rows came from."""
    (index,) = ctx.saved_tensors
    row = torch.arange(index.shape[0], device=index.device)[:, None]
    back = []
    for grad, shape in zip((hidden, cos, sin), ctx.shapes, strict=True):
        if grad is None:
            back.append(None)
        elif len(shape) == 3:
            back.append(grad.new_zeros(shape).index_put((row, index), grad))
        else:
            moved = grad.new_zeros((*shape[1:3], shape[0], shape[3])).index_put((row, index), grad.movedim(0, 2))
            back.append(moved.movedim(2, 0))
    return None, None, None, back[0], None, back[1], back[2], None, None


torch.library.register_autograd("vlmprune::select_gather", spread_gradients, setup_context=keep_index, lib=library)


@define
def greedy(
    features: Tensor, first: Tensor, counts: Tensor, candidates: Tensor, objective: str, steps: int
) -> tuple[Tensor, Tensor]:
    """Pick mutually dissimilar tokens by cosine, one at a time, starting from a given one; ties to the lower index.

    "max_sum" picks the token with the smallest sum of cosines to all picked ones, "max_min" (k-center, farthest first)
    the one whose nearest picked token is farthest, "log_det" the one farthest from the span of the picked ones, which
    is the greedy maximum of a determinantal point process on the cosines (arXiv 1709.05135).

    Args:
        features: `(images, tokens, dim)`.
        first: `(images,)` long, the first pick of every image.
        counts: `(images,)` long, picks per image, the first included.
        candidates: `(images, tokens)` bool.
        steps: the largest count.

    Returns:
        `(images, tokens)` bool mask of the picks, and `(images, steps)` long their order (arbitrary past an image's
        count).
    """
    if objective not in ("max_sum", "max_min", "log_det"):
        raise ValueError(f"objective={objective!r} is not one of 'max_sum', 'max_min', 'log_det'.")
    return run("greedy", features.detach(), first, counts, candidates, objective, steps)


@fake("greedy")
def _(features, first, counts, candidates, objective, steps):
    picked = torch.empty_like(candidates, memory_format=torch.contiguous_format)
    return picked, first.new_empty((features.shape[0], steps))


@register_flop_formula(torch.ops.vlmprune.greedy)
def greedy_flops(features, first, counts, candidates, objective, steps, *args, out_shape=None, **kwargs) -> int:
    """One row of cosines per pick."""
    images, tokens, dim = features
    return 2 * images * max(steps - 1, 0) * tokens * dim


@define
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
    """Attention received by every key: softmax(query key^T * scale + bias), head mean, weighted sum over query rows.

    Args:
        query: `(batch, heads, rows, dim)`.
        key: `(batch, key_heads, keys, dim)`; query heads are grouped over key heads.
        at: `(batch, rows)` long, the column of every row where attention is causal; None where it is not.
        real: `(batch, keys)` bool, keys that are no padding; None if all are.
        window: columns that a causal row sees backwards, itself included; 0 for all.
        weight: `(batch, rows)` weight of each query row; None is the mean over rows.
        bias: `(batch, keys)` added to the scores on every key, or None.

    Returns:
        `(batch, keys)` in float32 (float64 for float64 input); rows x keys scores never exist at one time. A row that
        sees no key counts as one that sees all alike.
    """
    return run("attention_mass", query, key, scale, at, real, window, weight, bias)


@fake("attention_mass")
def _(query, key, scale, at, real, window, weight, bias):
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return key.new_empty((key.shape[0], key.shape[2]), dtype=wide)


def no_gradient(ctx, grad):
    """Torch's own fallback would leave the gradient out; outputs of `top_k` and `greedy` have none to leave out."""
    raise RuntimeError("vlmprune.attention_mass has no gradient: call it under torch.no_grad(), or detach its result.")


torch.library.register_autograd("vlmprune::attention_mass", no_gradient, lib=library)


@register_flop_formula(torch.ops.vlmprune.attention_mass)
def attention_mass_flops(query, key, *args, out_shape=None, **kwargs) -> int:
    """One score per head, row and key, seen or not; the sum over rows is left out, as FLOP counters leave out sums."""
    batch, heads, rows, dim = query
    return 2 * batch * heads * rows * key[2] * dim


@define
def merge(
    hidden: Tensor, at: Tensor, alive: Tensor, keep: Tensor, into: Tensor, weight: Tensor, source: Tensor | None
) -> Tensor:
    """Write weighted sums of tokens over the kept ones; everything else stays.

    Args:
        hidden: `(batch, length, dim)`.
        at: `(images, tokens)` long index of every visual token into the flattened `(batch * length)`.
        alive: `(images, tokens)` bool, tokens that take part.
        keep: `(images, tokens)` bool, the tokens to write to, all alive; one that nothing flows into becomes zero.
        into: `(images, entries)` long, the token that an entry is added to.
        weight: `(images, entries)` float.
        source: `(images, entries)` long, the token that an entry is about; None means that entry t is about token t.

    Returns:
        `(batch, length, dim)`; sums run in float32 or better.
    """
    return run("merge", hidden, at, alive, keep, into, weight, source)


@fake("merge")
def _(hidden, at, alive, keep, into, weight, source):
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def keep_merge(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def merge_gradients(ctx, grad):
    hidden, at, alive, keep, into, weight, source = ctx.saved_tensors
    wide = torch.promote_types(hidden.dtype, torch.float32)
    rows, share = merge_weights(at, alive, weight, source, wide)
    flat = torch.cat((grad.flatten(0, 1), grad.new_zeros(1, grad.shape[-1])))  # a spare row for what is no anchor
    target = torch.where(keep, at, flat.shape[0] - 1)
    parts = flat[target].to(wide).gather(1, into[..., None].expand(-1, -1, grad.shape[-1]))
    own = flat.index_fill(0, target.flatten(), 0)[:-1].to(wide)
    own = own.index_add(0, rows.flatten(), (parts * share[..., None]).flatten(0, 1))
    by_weight = None
    if ctx.needs_input_grad[5]:
        taking = alive if source is None else alive.gather(1, source)
        by_weight = (parts * hidden.flatten(0, 1)[rows].to(wide)).sum(-1)
        by_weight = torch.where(taking, by_weight, 0).to(weight.dtype)
    return own.view_as(hidden).to(hidden.dtype), None, None, None, None, by_weight, None


torch.library.register_autograd("vlmprune::merge", merge_gradients, setup_context=keep_merge, lib=library)
