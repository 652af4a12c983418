"""Qwen2-VL, and what its successors share: pictures of any size, tokens of m x m patches, positions on three axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vlmprune.errors import UnsupportedError
from vlmprune.parts.packing import Packing
from vlmprune.patches.base import Family

__all__ = ["Qwen2VL"]


class Qwen2VL(Family):
    """`Qwen2VLForConditionalGeneration`. A size is (frames, rows, columns) of patches, as in `image_grid_thw`."""

    model_type = "qwen2_vl"
    title = "Qwen2-VL (Qwen2VLForConditionalGeneration)"
    trunk, axes, packed, sparse, needs_sizes, fixed = "visual", 3, True, True, True, ()
    bounds_pixels = True
    image = "a picture of any size, or a whole video: its number of tokens follows its pixels"
    modalities = ("image", "video")
    usual_tower, projector = "qwen2_vl_vision", "visual.merger"
    shared = ("image_grid_thw", "video_grid_thw")

    def tower_layers(self, tower: nn.Module) -> nn.ModuleList:
        return tower.blocks

    def side(self, inner: nn.Module, size: Any = None) -> tuple[int, int]:
        merge = inner.config.vision_config.spatial_merge_size
        return (0, 0) if size is None else (size[1] // merge, size[2] // merge)

    def check_strategy(self, inner: nn.Module, has_cls: bool) -> None:
        """All patches of the last layer become features."""

    def feature_layer(self, inner: nn.Module) -> int:
        return -1

    def processor_fields(self, inner: nn.Module) -> dict[str, Any]:
        return {}

    def sizes(self, modality: str, given: dict[str, Any]) -> list[Any]:
        if (grid := given.get(f"{modality}_grid_thw")) is None:
            raise UnsupportedError(f"pictures of {self.model_type} models come with {modality}_grid_thw.")
        return [tuple(size) for size in torch.as_tensor(grid).tolist()]

    def packing(self, inner: nn.Module, modality: str, size: Any) -> Packing:
        frames = size[0] if modality == "video" or size[0] > 1 else 0
        return Packing(lambda x, newline: x.flatten(0, 1), size[0], *self.side(inner, size), (1, 1), frames)

    def view_sizes(self, sizes: Sequence[Any]) -> list[int]:
        return [rows * cols for frames, rows, cols in sizes for _ in range(frames)]

    def tokens_of(self, tower: nn.Module, values: torch.Tensor, sizes: Sequence[Any], unit: int) -> torch.Tensor:
        # the m x m patches of a token are neighbours in the sequence
        return values.unflatten(1, (-1, tower.spatial_merge_size**2)).mean(2)

    def token_pixels(self, tower: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.unflatten(0, (-1, tower.spatial_merge_size**2)).flatten(1)

    def token_sizes(self, tower: nn.Module, sizes: Sequence[Any]) -> list[tuple[int, int, int]]:
        merge = tower.spatial_merge_size
        return [(frames, rows // merge, cols // merge) for frames, rows, cols in sizes]

    def mergers(self, tower: nn.Module) -> list[nn.Module]:
        return [tower.merger, *getattr(tower, "deepstack_merger_list", ())]

    def of_patches(self, kwargs: dict[str, Any], stay: torch.Tensor, before: torch.Tensor) -> dict[str, Any]:
        cos, sin = kwargs["position_embeddings"]
        ends = kwargs["cu_seqlens"]
        short = before[ends].to(ends.dtype).unique_consecutive()  # attention knows no windows of nothing
        # `max_seqlen`, which may stand beside the two, stays an upper bound
        return kwargs | {"position_embeddings": (cos[stay], sin[stay]), "cu_seqlens": short}
