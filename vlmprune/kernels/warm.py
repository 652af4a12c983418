"""Loading what a plan will run, so that its first prefill does not wait for a compiler, nor meet it in a capture."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from vlmprune.kernels import choice
from vlmprune.kernels.cases import CASES
from vlmprune.kernels.choice import OPS

__all__ = ["warm_up"]

MOST = 8192  # columns of a case: longer ones cost memory, and are loaded when they come
warmed: set[tuple[str, torch.dtype]] = set()


def warm_up(devices: Iterable[torch.device], dtype: torch.dtype, ops: tuple[str, ...] = OPS) -> None:
    """Try the ops on GPUs that are new to this machine (`trial.py`), and load their kernels; once a process.

    All ops are loaded, in every configuration that small cases have: which of them a method calls is its own affair.
    Other devices need nothing. While a CUDA graph is captured, nothing happens.

    Args:
        devices: where the model's weights are.
        dtype: what it computes in.
    """
    for device in set(devices):
        if device.type != "cuda" or (str(device), dtype) in warmed or choice.capturing(device):
            continue
        warmed.add((str(device), dtype))
        for op in ops:
            load(op, device, dtype)
        torch.cuda.synchronize(device)


def load(op: str, device: torch.device, dtype: torch.dtype) -> None:
    """Run an op's cases in `dtype`, by whatever implementation they go to."""
    for _, args in CASES[op]():
        if fits([x for x in args if isinstance(x, torch.Tensor)], dtype):
            choice.run(op, *[x.to(device) if isinstance(x, torch.Tensor) else x for x in args])


def fits(tensors: list[torch.Tensor], dtype: torch.dtype) -> bool:
    """Whether a case is one of a model in `dtype`, whose scores and sums are float32, and not too long."""
    kinds = {x.dtype for x in tensors if x.is_floating_point()}
    return kinds <= {dtype, torch.float32} and max(max(x.shape, default=0) for x in tensors) <= MOST
