"""LLaVA-1.6 / LLaVA-NeXT: a thumbnail and a grid of crops, un-padded, with a newline after each row of the canvas."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, image_size_to_num_patches

from vlmprune.patches.base import Family

__all__ = ["LlavaNext"]


class LlavaNext(Family):
    """`LlavaNextForConditionalGeneration`."""

    model_type = "llava_next"
    title = "LLaVA-1.6 / LLaVA-NeXT (LlavaNextForConditionalGeneration)"
    views = True
    needs_sizes = True

    def grid(self, inner: nn.Module, size: tuple[int, int] | None) -> tuple[int, tuple[int, int]]:
        tile, pinpoints = inner.config.vision_config.image_size, inner.config.image_grid_pinpoints
        views = image_size_to_num_patches(size, pinpoints, tile)
        return views, get_anyres_image_grid_shape(size, pinpoints, tile)

    def pack(self, inner: nn.Module, views: torch.Tensor, newline: torch.Tensor, size: Any) -> torch.Tensor:
        strategy = inner.config.vision_feature_select_strategy
        packed, _ = inner.pack_image_features([views], [size], strategy, image_newline=newline)
        return packed[0]
