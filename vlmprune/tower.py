"""The hooks inside the vision tower: they measure taps while it runs and leave them on its output.

`BeforeTower` puts a frame into the keyword arguments, the host hands these to every layer, `BeforeTowerLayer` takes it
out and measures, `AfterTower` leaves what was seen on the output object, which comes back with the image features.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlmprune.plan import FRAME, Plan
from vlmprune.taps import Tap, TowerTap

__all__ = ["SEEN", "SIZES", "AfterTower", "BeforeTower", "BeforeTowerLayer", "RememberSizes"]

SEEN = "_vlmprune_seen"  # attribute of the tower's output: measured taps
SIZES = "_vlmprune_sizes"  # attribute of the tower's output: (height, width) of every image


class TowerFrame:
    """One pass through the vision tower: the inputs of the layers that taps look at."""

    def __init__(self, taps: list[TowerTap], has_cls: bool):
        self.taps, self.has_cls = taps, has_cls
        self.seen: dict[Tap, torch.Tensor] = {}

    def enter(self, index: int, layer: nn.Module, hidden: torch.Tensor) -> None:
        """Measure what is to be seen of tower layer `index`, from its input `(views, tokens, dim)`."""
        for tap in self.taps:
            if tap.layer == index:
                self.seen[tap] = tap.measure(layer, hidden.detach(), self.has_cls)


@dataclass
class BeforeTower:
    """Pre-hook of the tower: starts a frame if any cut wants to see the tower."""

    plan: Plan

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not self.plan.enabled or not self.plan.tower_taps:
            return None
        return args, kwargs | {FRAME: TowerFrame(self.plan.tower_taps, self.plan.facts.has_cls)}


@dataclass
class BeforeTowerLayer:
    """Pre-hook of a tower layer: takes the frame out and lets it measure."""

    index: int

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if FRAME not in kwargs:
            return None
        frame = kwargs.pop(FRAME)
        with torch.no_grad():  # scores choose tokens; nothing is learned through them
            frame.enter(self.index, module, args[0] if args else kwargs["hidden_states"])
        return args, kwargs


@dataclass
class AfterTower:
    """Hook of the tower: leaves what was seen on its output."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if (frame := kwargs.get(FRAME)) is not None:
            setattr(output, SEEN, frame.seen)


class RememberSizes:
    """Stands before `get_image_features` on one instance: notes the image sizes, which `generate` then throws away.

    A bound attribute of the instance and not a hook, because no module is called with the sizes.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.__signature__ = inspect.signature(type(module).get_image_features.__get__(module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(self.__signature__.bind(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        # the host only computes with the sizes on the host: one read here spares it one per image
        sizes = torch.as_tensor(given.pop("image_sizes")).cpu()
        output = type(self.module).get_image_features(self.module, image_sizes=sizes, **given)
        if not isinstance(output, tuple):
            setattr(output, SIZES, [tuple(size) for size in sizes.tolist()])
        return output
