"""Where accelerate keeps a module's weights and runs it: offloaded weights are there during a module's forward alone.

Hooks of ours run before the forward, so what they call of a module is called between `loaded` weights. Nothing here
imports accelerate; its hook on a module is that module's `_hf_hook`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from vlmprune.errors import UnsupportedError

__all__ = ["check_device", "loaded"]


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """Have the weights in place that accelerate would load for this module's forward."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def check_device(layer: nn.Module, hidden: torch.Tensor) -> None:
    """Refuse a layer that accelerate would run elsewhere than where its input is.

    Raises:
        UnsupportedError: the layers of a tower or language model are spread over several devices.
    """
    planned = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    if planned is None:
        return
    planned, found = torch.device(planned), hidden.device
    known = planned.index is not None and found.index is not None  # "cuda" is the current one
    if planned.type != found.type or (known and planned.index != found.index):
        raise UnsupportedError(
            f"layers spread over several devices ({found}, then {planned}) are not supported: put "
            "the vision tower on one device and the language model on one, with what does not fit there on 'cpu' or "
            "'disk' (device_map), or unpatch the model."
        )
