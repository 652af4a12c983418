"""CUDA C++ implementations: `csrc/`, shipped as PTX that the driver compiles for the device at hand (`driver.py`)."""

from __future__ import annotations

import hashlib
import struct
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from vlmprune.kernels import driver
from vlmprune.kernels.checks import Refused
from vlmprune.kernels.choice import capturing
from vlmprune.kernels.reference import empty_gather

__all__ = ["PTX_OPTIONS", "SOURCES", "ptx_head", "select_gather", "top_k"]

SOURCES = Path(__file__).parent / "csrc"
PTX = SOURCES / "select_gather.ptx"
PTX_OPTIONS = ("--gpu-architecture=compute_75", "--std=c++17")  # of scripts/build_ptx.py
MOVERS, CHOOSERS, ROWS = (
    256,
    1024,
    32,
)  # threads that move rows and that choose, and rows a block moves: as in the source
KINDS = {torch.bool: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
MOST_COLUMNS, MOST_STEP = 2**21 - 1, 2**31 - 1
# above so many columns one block chooses for a sample; below, every block that moves rows chooses for itself
CHOOSE_ONCE = 8192
# pointers, then numbers, of the kernels' arguments: their natural alignment leaves no gaps in this order
PACK = {"top_k": struct.Struct("4Q2i"), "choose": struct.Struct("7Q7i"), "select_gather": struct.Struct("15Q24i")}


def ptx_head(source: Path) -> str:
    """First line of the PTX of a source, by which a test knows that it is up to date."""
    made = hashlib.sha256(source.read_bytes() + " ".join(PTX_OPTIONS).encode()).hexdigest()
    return f"// {source.name}, {made}; made by scripts/build_ptx.py\n"


@lru_cache(maxsize=64)
def processors(device: int) -> int:
    """Multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(name: str, grid: tuple[int, int], threads: int, arguments: tuple[int, ...], device: torch.device) -> None:
    """Start a kernel on the current stream of `device`, which `choice.run` has made the current one."""
    index = device_index(device)
    if capturing(device) and not driver.loaded(PTX, name, index):
        raise Refused("its first use on this device is inside a CUDA-graph capture, where nothing can be loaded")
    packed, stream = PACK[name].pack(*arguments), driver.current_stream(index)
    driver.launch(driver.load(PTX, name, index), grid, threads, stream, packed, name)


def address(x: Tensor | None) -> int:
    """Where a tensor starts, 0 for none and for an empty one."""
    return 0 if x is None else x.data_ptr()


def check(scores: Tensor, columns: int) -> None:
    """Raise Refused for scores that the kernels do not have."""
    if scores.dtype not in KINDS:
        raise Refused(f"scores are {scores.dtype}")
    if columns > MOST_COLUMNS:
        raise Refused(f"there are more than {MOST_COLUMNS} columns")


def top_k(scores: Tensor, counts: Tensor, candidates: Tensor) -> Tensor:
    columns = scores.shape[-1]
    if scores.dtype == torch.bool:
        raise Refused("scores are bool")
    check(scores, columns)
    out = torch.empty_like(candidates, memory_format=torch.contiguous_format)
    if out.numel():
        scores, candidates = scores.contiguous(), candidates.contiguous()
        counts = counts.expand(scores.shape[:-1]).long().contiguous()
        numbers = KINDS[scores.dtype], columns
        where = scores.data_ptr(), counts.data_ptr(), candidates.data_ptr(), out.data_ptr()
        threads = MOVERS if columns <= CHOOSE_ONCE else CHOOSERS
        launch("top_k", (out.numel() // columns, 1), threads, (*where, *numbers), scores.device)
    return out


def row_steps(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """`x` with rows that lie in one piece, and the bytes from one axis, sample and column to the next."""
    steps = x.stride()
    if steps[-1] != 1 and x.shape[-1] > 1:
        x = x.contiguous()
        steps = x.stride()
    size = x.element_size()
    return x, (steps[0] * size if len(steps) == 4 else 0, steps[-3] * size, steps[-2] * size)


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
) -> tuple[Tensor, ...]:
    batch, columns = scores.shape
    check(scores, columns)
    check_moved(hidden, ids, cos, sin)
    rotary, rotary_bytes = cos.shape[-1], cos.shape[-1] * cos.element_size()
    outs = empty_gather(scores, hidden, ids, cos, sin, length)
    if batch == 0:
        return outs
    (hidden, step), (cos, cos_step), (sin, sin_step) = row_steps(hidden), row_steps(cos), row_steps(sin)
    id_step = [0] * (3 - ids.ndim) + list(ids.stride())
    chosen_by = (
        KINDS[scores.dtype], columns, length, *scores.stride(), *((0, 0) if real is None else real.stride()),
    )  # fmt: skip
    numbers = (
        *step[1:], hidden.shape[-1] * hidden.element_size(), 1 if ids.ndim == 2 else ids.shape[0], *id_step,
        (1 if cos.ndim == 3 else cos.shape[0]) if rotary else 0, rotary_bytes, *cos_step, *sin_step,
    )  # fmt: skip
    if max(max(chosen_by), max(numbers)) > MOST_STEP:
        raise Refused("a tensor is too large for steps of 31 bits")
    device = hidden.device
    counts = None if counts is None else counts.long().contiguous()
    where, found = (address(scores), address(counts), address(real)), [x.data_ptr() for x in outs]
    gone = None
    if columns > CHOOSE_ONCE and length:
        gone = torch.empty((batch, length), dtype=torch.int32, device=device)
        launch("choose", (1, batch), CHOOSERS, (*where, gone.data_ptr(), *found[4:], *chosen_by), device)
    rows = rows_of_a_block(batch * length, device)
    # a block is needed even for a length of 0: it counts what was dropped
    grid = (max(1, -(-length // rows)), batch)
    where += (address(gone), hidden.data_ptr(), ids.data_ptr(), cos.data_ptr(), sin.data_ptr())
    launch("select_gather", grid, MOVERS, (*where, *found, *chosen_by, rows, int(contiguous), *numbers), device)
    return outs


def check_moved(hidden: Tensor, ids: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Refuse dtypes that the kernel does not move."""
    if any(x.element_size() % 2 for x in (hidden, cos, sin)) or ids.dtype != torch.long or cos.dtype != sin.dtype:
        raise Refused(f"hidden is {hidden.dtype}, cos {cos.dtype}, sin {sin.dtype} and ids {ids.dtype}")


def rows_of_a_block(rows: int, device: torch.device) -> int:
    """Enough blocks for two on every processor, and no more where each of them chooses anew."""
    return max(1, min(ROWS, -(-rows // (2 * processors(device_index(device))))))


def device_index(device: torch.device) -> int:
    """The number of a GPU, 0 for anything else (the tests run the kernels on a CPU)."""
    return 0 if device.type != "cuda" else torch.cuda.current_device() if device.index is None else device.index
