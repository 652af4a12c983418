"""Qwen2.5-VL: most layers of the tower look at windows, and all of them read patches window by window."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from vlmprune.parts.layout import upload
from vlmprune.patches.qwen2_vl import Qwen2VL

__all__ = ["Qwen2_5VL"]


@lru_cache(maxsize=64)
def home_of(sizes: tuple[tuple[int, int, int], ...], merge: int, window: int, patch: int) -> torch.Tensor:
    """`(tokens,)` where each token of pictures of these sizes stands among those that the tower reads by windows."""
    from transformers.vision_utils import get_vision_window_index

    order, _ = get_vision_window_index(torch.tensor(sizes), merge, window, patch)
    return order.argsort()  # `order` says which token stands where, and this is its inverse


class Qwen2_5VL(Qwen2VL):
    """`Qwen2_5_VLForConditionalGeneration`."""

    model_type = "qwen2_5_vl"
    title = "Qwen2.5-VL (Qwen2_5_VLForConditionalGeneration)"
    usual_tower = "qwen2_5_vl_vision"

    def windowed(self, inner: nn.Module) -> tuple[int, ...]:
        vision = inner.config.vision_config
        return tuple(layer for layer in range(vision.depth) if layer not in vision.fullatt_block_indexes)

    def reading_order(self, tower: nn.Module, sizes: Sequence[Any]) -> torch.Tensor:
        return home_of(tuple(sizes), tower.spatial_merge_size, tower.window_size, tower.patch_size).argsort()

    def tokens_of(self, tower: nn.Module, values: torch.Tensor, sizes: Sequence[Any], unit: int) -> torch.Tensor:
        home = home_of(tuple(sizes), tower.spatial_merge_size, tower.window_size, tower.patch_size)
        return super().tokens_of(tower, values, sizes, unit)[:, upload(home, values.device)]
