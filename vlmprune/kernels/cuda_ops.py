"""CUDA C++ implementations: the sources of `csrc/`, compiled for the device at hand the first time they are needed."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmprune.kernels.choice import Refused
from vlmprune.kernels.reference import empty_gather

__all__ = ["SOURCES", "select_gather", "top_k"]

SOURCES = Path(__file__).parent / "csrc"
THREADS, ROWS = 256, 32  # as in select_gather.cu
KINDS = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
MOST_COLUMNS, MOST_STEP = 2**21 - 1, 2**31 - 1


@lru_cache(maxsize=64)
def kernel(name: str, device: int) -> Any:
    """A kernel of `select_gather.cu` for a device, compiled once a process (a few seconds)."""
    with torch.cuda.device(device):
        return torch.cuda._compile_kernel((SOURCES / "select_gather.cu").read_text(), name)


@lru_cache(maxsize=64)
def processors(device: int) -> int:
    """Multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(name: str, grid: tuple[int, int], args: list[Tensor | int], device: torch.device) -> None:
    """Start a kernel on the current stream of `device`; an empty tensor arrives as a null pointer."""
    index = torch.cuda.current_device() if device.index is None else device.index
    with torch.cuda.device(index):
        kernel(name, index)(grid=(*grid, 1), block=(THREADS, 1, 1), args=args)


def check(columns: int) -> None:
    """Raise Refused for more columns than the kernels can count."""
    if columns > MOST_COLUMNS:
        raise Refused(f"there are {columns} columns, and {MOST_COLUMNS} are the most")


def top_k(scores: Tensor, counts: Tensor, candidates: Tensor) -> Tensor:
    columns = scores.shape[-1]
    if scores.dtype not in KINDS:
        raise Refused(f"scores are {scores.dtype}")
    check(columns)
    out = torch.empty_like(candidates, memory_format=torch.contiguous_format)
    if out.numel():
        rows = out.numel() // columns
        shape = scores.shape[:-1]
        args = [scores.contiguous(), counts.expand(shape).long().contiguous(), candidates.contiguous(), out]
        launch("top_k", (rows, 1), [*args, KINDS[scores.dtype], columns], scores.device)
    return out


def row_steps(x: Tensor) -> tuple[Tensor, list[int]]:
    """`x` with rows that lie in one piece, and the bytes from one axis, sample and column to the next."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    size = x.element_size()
    steps = [s * size for s in x.stride()[:-1]]
    return x, [0] * (3 - len(steps)) + steps


def select_gather(
    keep: Tensor,
    real: Tensor | None,
    hidden: Tensor,
    ids: Tensor,
    cos: Tensor,
    sin: Tensor,
    length: int,
    contiguous: bool,
) -> tuple[Tensor, ...]:
    batch, columns = keep.shape
    check(columns)
    rotary, rotary_bytes = cos.shape[-1], cos.shape[-1] * cos.element_size()
    if any(x.element_size() % 2 for x in (hidden, cos, sin)) or ids.dtype != torch.long or cos.dtype != sin.dtype:
        raise Refused(f"hidden is {hidden.dtype}, cos {cos.dtype}, sin {sin.dtype} and ids {ids.dtype}")
    outs = empty_gather(keep, hidden, ids, cos, sin, length)
    if batch == 0:
        return outs
    (hidden, step), (cos, cos_step), (sin, sin_step) = map(row_steps, (hidden, cos, sin))
    id_step = [0] * (3 - ids.ndim) + list(ids.stride())
    numbers = [
        *keep.stride(), *((0, 0) if real is None else real.stride()), *step[1:],
        hidden.shape[-1] * hidden.element_size(), 1 if ids.ndim == 2 else ids.shape[0], *id_step,
        1 if cos.ndim == 3 else cos.shape[0], rotary_bytes, *cos_step, *sin_step,
    ]  # fmt: skip
    if max(numbers) > MOST_STEP:
        raise Refused("a tensor is too large for steps of 31 bits")
    # enough blocks for two on every processor, and no more: each of them chooses anew
    share = -(-batch * length // (2 * processors(device_index(hidden.device)))) if length else 1
    rows = max(1, min(ROWS, share))
    # a block is needed even for a length of 0: it counts what was dropped
    grid = (max(1, -(-length // rows)), batch)
    nothing = hidden.new_empty(0)
    args = [keep, nothing if real is None else real]
    args += [hidden, ids, cos if rotary else nothing, sin if rotary else nothing, *outs]
    launch("select_gather", grid, [*args, columns, length, rows, int(contiguous), *numbers], hidden.device)
    return outs


def device_index(device: torch.device) -> int:
    """The number of a GPU, 0 for anything else (the tests run the kernels on a CPU)."""
    return 0 if device.type != "cuda" else torch.cuda.current_device() if device.index is None else device.index
