"""Pixtral as LLaVA's tower: pictures of any size, and a break behind every row of a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vlmprune.parts.layers import TowerLayer
from vlmprune.patches.base import Family
from vlmprune.patches.towers import packed_views, pooled

__all__ = ["PIXTRAL", "LlavaPixtral"]


class LlavaPixtral(Family):
    """LLaVA's class with Pixtral's tower: all pictures of a batch are one sequence, which the tower's mask divides.

    The processor writes a break behind every row of a picture. Breaks are text, and stay.
    """

    model_type = "llava"
    title = "Pixtral (LlavaForConditionalGeneration)"
    usual_tower = "pixtral"
    image = "a picture of any size; the break behind each of its rows is text and stays"
    needs_sizes = True
    packed = True

    def tower_layers(self, tower: nn.Module) -> nn.ModuleList:
        return tower.transformer.layers

    def side(self, inner: nn.Module, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Of an image of `size` (height, width) in pixels."""
        step = inner.config.vision_config.patch_size * self.unit(inner)
        return (0, 0) if size is None else (size[0] // step, size[1] // step)

    def tower_views(
        self, layer: nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any], sizes: Sequence[Any]
    ) -> list[tuple[TowerLayer, torch.Tensor]]:
        patches = [math.prod(shape) for shape in shapes(sizes, layer.attention.config.patch_size)]
        return packed_views(layer, hidden[0], kwargs["position_embeddings"], patches)

    def tokens_of(self, tower: nn.Module, values: torch.Tensor, sizes: Sequence[Any], unit: int) -> torch.Tensor:
        rasters = shapes(sizes, tower.patch_size)
        views = values.split([math.prod(shape) for shape in rasters], 1)
        return torch.cat([pooled(view, shape, unit) for view, shape in zip(views, rasters, strict=True)], 1)

    def processor_fields(self, inner: nn.Module) -> dict[str, Any]:
        return {"patch_size": inner.config.vision_config.patch_size, "spatial_merge_size": self.unit(inner)}


def shapes(sizes: Sequence[tuple[int, int]], patch: int) -> list[tuple[int, int]]:
    """(rows, cols) of patches of pictures of `sizes` (height, width) in pixels."""
    return [(height // patch, width // patch) for height, width in sizes]


PIXTRAL = LlavaPixtral()
