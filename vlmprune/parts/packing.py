"""The layouts that a model has met lately: traced once per packing, shared by all picture sizes that pack alike."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch

from vlmprune.parts.layout import ImageGrid
from vlmprune.parts.tracing import noise, trace_packing

__all__ = ["Layouts", "Packing"]


@dataclass(frozen=True)
class Packing:
    """How the views of one image or video become tokens: the arguments of `trace_packing`."""

    pack: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    views: int
    rows: int
    cols: int
    grid: tuple[int, int]
    frames: int = 0
    apart: bool = False

    def key(self) -> tuple:
        """Equal for packings with equal layouts, and no others: one channel of noise goes through the packing."""
        packed = self.pack(noise(self.views, self.rows * self.cols), torch.zeros(1, dtype=torch.float64))
        told = hashlib.blake2b(packed.contiguous().numpy().tobytes(), digest_size=16).digest()
        return self.views, self.rows, self.cols, self.grid, self.frames, self.apart, told

    def trace(self) -> ImageGrid:
        """The layout."""
        return trace_packing(self.pack, self.views, self.rows, self.cols, self.grid, self.frames, self.apart)


class Layouts:
    """The layouts of the sizes met lately, bounded: what was used longest ago goes first.

    Copies (of a model, of its patch) start empty.

    Args:
        sizes: sizes that are remembered; some hundred bytes each.
        layouts: layouts that are kept; 70 to 900 KiB each for models with views of 24 x 24 or 27 x 27 patches.
    """

    def __init__(self, sizes: int = 4096, layouts: int = 64):
        self.most_sizes, self.most_layouts = sizes, layouts
        self.sizes: dict[Any, tuple] = {}
        self.layouts: dict[tuple, ImageGrid] = {}
        self.lock = Lock()

    def __reduce__(self) -> tuple:
        return Layouts, (self.most_sizes, self.most_layouts)

    def __len__(self) -> int:
        return len(self.layouts)

    def find(self, size: Any, packing: Callable[[], Packing]) -> ImageGrid:
        """The layout of a size; `packing` is asked where it is not known."""
        if torch.compiler.is_compiling():  # a graph takes what is there, and touches nothing
            known = self.layouts.get(self.sizes.get(size))
            return packing().trace() if known is None else known
        with self.lock:
            key = self.sizes.get(size)
            if key in self.layouts:
                return self.remember(size, key, self.layouts[key])
        made = packing()
        key = made.key()
        with self.lock:
            known = self.layouts.get(key)
        grid = made.trace() if known is None else known
        with self.lock:
            return self.remember(size, key, grid)

    def remember(self, size: Any, key: tuple, grid: ImageGrid) -> ImageGrid:
        """Move a size and its layout to the end, and drop what stands in front of too many."""
        for known, name, value, most in (
            (self.sizes, size, key, self.most_sizes),
            (self.layouts, key, grid, self.most_layouts),
        ):
            known.pop(name, None)
            known[name] = value
            if len(known) > most:
                del known[next(iter(known))]
        return grid
