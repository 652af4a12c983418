"""A packed tower that reads a part of its patches: what its layers are handed, and what its mergers make of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlmprune.engine.decided import check_kept, whose
from vlmprune.engine.plan import Hook, Plan
from vlmprune.engine.watch import Watch
from vlmprune.parts.cuts import PatchCut
from vlmprune.parts.layout import upload

__all__ = ["AfterMerger", "Thin"]


class Thin:
    """What is left of all pictures in one call of a packed tower.

    The tower prepares every patch as ever; in front of its first layer those that go are taken out, with all that the
    host hands every layer for them. Behind the mergers each token that went is there again as zeros: the rest of the
    model finds as many as it counts on.

    Attributes:
        keep: `(tokens,)` bool in raster order.
        read: the same in the order of reading.
        stay, before: as of `Family.of_patches`.
        made: what layers were handed and are handed instead; most of them get the same.
    """

    def __init__(self, plan: Plan, cut: PatchCut, tower: nn.Module, pixels: torch.Tensor, sizes: list[Any]):
        self.family, tokens = plan.family, plan.family.token_pixels(tower, pixels)
        with torch.no_grad():
            self.keep = cut.reduce(tokens, self.family.token_sizes(tower, sizes))
            check_kept(whose(plan, cut), self.keep, tokens)
            order = self.family.reading_order(tower, sizes)
            self.read = self.keep if order is None else self.keep[upload(order, pixels.device)]
            patches = self.read.repeat_interleave(len(pixels) // len(tokens))
            self.stay = patches.nonzero().flatten()  # the device is waited for: the layers' lengths hang on it
            self.before = nn.functional.pad(patches.cumsum(0), (1, 0))
        self.made: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def enter(self, index: int, hidden: torch.Tensor, kwargs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        """What a layer is handed instead of its `(patches, dim)` and keyword arguments."""
        handed = next((new for old, new in self.made if same(old, kwargs)), None)
        if handed is None:
            handed = self.family.of_patches(kwargs, self.stay, self.before)
            self.made.append((kwargs, handed))
        return (hidden if index else hidden[self.stay]), handed

    def whole(self, values: torch.Tensor) -> torch.Tensor:
        """`(tokens or patches that stay, dim)`, in the order of reading, with zeros for those that went."""
        each = len(self.before[1:]) // len(self.read)
        parts = values.unflatten(0, (-1, each)) if len(values) == len(self.stay) else values[:, None]
        place = (self.read.cumsum(0) - 1).clamp(min=0)
        return parts[place].masked_fill(~self.read[:, None, None], 0).flatten(0, 1)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two calls hand on the same objects."""
    return one.keys() == other.keys() and all(one[name] is other[name] for name in one)


@dataclass
class AfterMerger(Hook):
    """Hook of a module that makes tokens of a tower's patches: gives every token that went its place again."""

    watching: Watch

    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        frame = self.watching.frame(last=False)
        return None if frame is None or frame.thin is None else frame.thin.whole(output)
