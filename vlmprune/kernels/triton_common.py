"""What the Triton implementations share: sizes of programs, launching, the order of floats."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmprune.kernels.checks import Refused
from vlmprune.kernels.choice import capturing

__all__ = ["LOWEST_KEY", "MOST_COLUMNS", "block_of", "ordered", "processors", "single", "start", "warps"]

MOST_COLUMNS = 16384  # columns of which one program holds all keys in registers
LOWEST_KEY = tl.constexpr(-(2**31))


def warps(block: int) -> int:
    """Warps of a program that holds `block` columns."""
    return 4 if block <= 1024 else 8 if block <= 4096 else 32


def block_of(columns: int) -> int:
    """The power of two that holds all columns (a few sizes for many counts), or Refused."""
    if columns > MOST_COLUMNS:
        raise Refused(f"there are more than {MOST_COLUMNS} columns")
    return max(1024, triton.next_power_of_2(columns))


@lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; a few on a CPU, so that the interpreter goes every way."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def single(*tensors: Tensor) -> None:
    """Refuse float64: the kernels compute in float32."""
    if any(x.dtype == torch.float64 for x in tensors):
        raise Refused("the tensors are float64")


def start(device: torch.device, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel; while a CUDA graph is captured only one that is loaded."""
    if capturing(device):
        with loaded_only():
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


hooking = threading.Lock()  # threads that capture at one time would put back each other's hook


@contextmanager
def loaded_only() -> Iterator[None]:
    """Within it Triton raises Refused before it compiles anything for a stream that is being captured."""
    from triton import knobs

    def refuse(*args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_current_stream_capturing():  # another thread may go on
            raise Refused(
                "its first use with such arguments is inside a CUDA-graph capture, where nothing can be loaded"
            )

    with hooking:
        before = knobs.runtime.jit_cache_hook
        knobs.runtime.jit_cache_hook = refuse
        try:
            yield
        finally:
            knobs.runtime.jit_cache_hook = before


@triton.jit
def ordered(x):
    """Whole numbers in the order of floats: NaN above everything, -0 equal to 0, and none of them LOWEST_KEY."""
    bits = tl.where(x == 0.0, 0, x.to(tl.int32, bitcast=True))
    return tl.where(x != x, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
