"""Noticing NaN and infinity: tokens that are ranked by them are garbage which looks like an answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

__all__ = ["WAY_OUT", "cut_is_finite", "demand", "each_finite"]

WAY_OUT = (
    "Look for NaN or infinity in pixel_values and in the weights; where there is none, the model overflows in its "
    "dtype: load it in bfloat16 or float32"
)


def each_finite(values: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """`(values,)` bool on `device`: which tensors hold finite numbers alone. One reduction each; nothing waits."""
    with torch.no_grad():
        # NaN and infinity go through extremes, which are the fastest to find
        ends = [end.to(device) for x in values for end in torch.aminmax(x.detach())]
        return torch.stack(ends).isfinite().view(-1, 2).all(1) if ends else torch.ones(0, device=device) > 0


def cut_is_finite(seen: Iterable[torch.Tensor], scores: torch.Tensor | None, alive: torch.Tensor) -> torch.Tensor:
    """`()` bool: whether all that a cut goes by is a number.

    Args:
        seen: taps, `(images, tokens, ...)` or about whole images `(images, ...)`.
        scores: `(images, tokens)`, which may be infinite ("never", "always") and not NaN; None without any.
        alive: `(images, tokens)` bool, the tokens that count.
    """
    with torch.no_grad():
        bad = [] if scores is None else [scores.isnan() & alive]
        for values in seen:
            if values.shape[:2] == alive.shape:
                least, most = torch.aminmax(values.detach().reshape(*alive.shape, -1), dim=-1)
                bad.append(~(least.isfinite() & most.isfinite()) & alive)
            else:
                bad.append(~values.detach().isfinite())
        return ~torch.stack([x.any() for x in bad]).any() if bad else alive.new_ones(())


def demand(good: torch.Tensor, told: str) -> None:
    """Raise unless `good`, checked where the tensor is so that nothing waits for it.

    Raises:
        ValueError: on a CPU; a GPU reports a failed assertion with the next operation that waits for it.
    """
    if torch.compiler.is_compiling():
        return torch._assert_async(good, told)
    try:
        torch._assert_async(good, told)
    except RuntimeError:
        raise ValueError(told) from None
