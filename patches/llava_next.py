"""LLaVA-1.6 / LLaVA-NeXT: a thumbnail and a grid of crops, un-padded, with a newline after each row of the canvas."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import nn

from vlmprune.patches.base import Family

__all__ = ["LlavaNext", "anyres_grid"]


def anyres_grid(host: ModuleType, inner: nn.Module, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """Views of a picture of `size` and the grid of its crops, by the functions of the host's own file."""
    tile, pinpoints = inner.config.vision_config.image_size, inner.config.image_grid_pinpoints
    views = host.image_size_to_num_patches(size, pinpoints, tile)
    return views, host.get_anyres_image_grid_shape(size, pinpoints, tile)


class LlavaNext(Family):
    """`LlavaNextForConditionalGeneration`."""

    model_type = "llava_next"
    title = "LLaVA-1.6 / LLaVA-NeXT (LlavaNextForConditionalGeneration)"
    by_formula = True
    views = True
    needs_sizes = True

    def grid(self, inner: nn.Module, size: tuple[int, int] | None) -> tuple[int, tuple[int, int]]:
        # imported late: transformers' model files take seconds to load, and `vlmprune --help` needs none
        from transformers.models.llava_next import modeling_llava_next as host

        return anyres_grid(host, inner, size)

    def pack(self, inner: nn.Module, views: torch.Tensor, newline: torch.Tensor, size: Any) -> torch.Tensor:
        strategy = inner.config.vision_feature_select_strategy
        packed, _ = inner.pack_image_features([views], [size], strategy, image_newline=newline)
        return packed[0]
