"""A note on a tensor, for hosts that hand on tensors and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_iter

__all__ = ["Tagged", "tag", "untag"]


class Tagged(torch.Tensor):
    """A tensor with a note that stays on whatever a host makes of it on the way (moved, cast, cut, repeated for beams).

    It exists between two of our hooks alone: no module of the model ever computes with it.
    """

    note: Any

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        note = next((x.note for x in tree_iter((args, kwargs)) if isinstance(x, Tagged)), None)
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
        if type(out) in (tuple, list):  # split into pieces
            return type(out)(carry(x, note) for x in out)
        return carry(out, note)


def carry(made: Any, note: Any) -> Any:
    """Put a note on what was made of a tensor; masks, sizes and the like, read off it, are not the tensor any more."""
    return tag(made, note) if isinstance(made, torch.Tensor) and made.is_floating_point() and made.ndim > 2 else made


def tag(tensor: torch.Tensor, note: Any) -> torch.Tensor:
    """The same tensor (same storage, same history) with a note."""
    with torch._C.DisableTorchFunctionSubclass():
        made = tensor.as_subclass(Tagged)
    made.note = note
    return made


def untag(tensor: Any) -> tuple[Any, Any]:
    """The plain tensor and its note; the note is None where there is none."""
    if not isinstance(tensor, Tagged):
        return tensor, None
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor), tensor.note
