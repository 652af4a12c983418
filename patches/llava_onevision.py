"""LLaVA-OneVision: anyres with a canvas that is shrunk to nine views' worth, plain several images, and videos."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from vlmprune.patches.base import Family
from vlmprune.patches.llava_next import anyres_grid

__all__ = ["LlavaOnevision"]


class LlavaOnevision(Family):
    """`LlavaOnevisionForConditionalGeneration`.

    Images that stand alone in their prompt have crops. One of several has a single view (its size is None here). A
    frame of a video is pooled to half its side; one newline ends a video.
    """

    model_type = "llava_onevision"
    title = "LLaVA-OneVision (LlavaOnevisionForConditionalGeneration)"
    views = needs_sizes = by_formula = True
    modalities = ("image", "video")
    usual_tower = "siglip_vision_model"
    single = "several images of one prompt, which have no crops"
    shrinks = ("image", "video")
    fixed = (*Family.fixed, "vision_aspect_ratio")

    def sizes(self, modality: str, given: dict[str, Any]) -> list[Any]:
        known, together = super().sizes(modality, given), given.get("batch_num_images")
        if modality == "video" or together is None:
            return known
        alone = [n == 1 for n in torch.as_tensor(together).tolist() for _ in range(n)]
        return [size if single else None for size, single in zip(known, alone, strict=True)]

    def processor_fields(self, inner: nn.Module) -> dict[str, Any]:
        return {"num_image_tokens": math.prod(self.side(inner)), "vision_feature_select_strategy": self.strategy(inner)}

    def grid(self, inner: nn.Module, size: tuple[int, int] | None) -> tuple[int, tuple[int, int]]:
        if size is None:
            return 1, (1, 1)
        # imported late: transformers' model files take seconds to load, and `vlmprune --help` needs none
        from transformers.models.llava_onevision import modeling_llava_onevision as host

        return anyres_grid(host, inner, size)

    def pack(self, inner: nn.Module, views: torch.Tensor, newline: torch.Tensor, size: Any) -> torch.Tensor:
        ratio = inner.config.vision_aspect_ratio
        packed, _ = inner.pack_image_features([views], [size], image_newline=newline, vision_aspect_ratio=ratio)
        return packed[0]

    def pack_video(self, inner: nn.Module, frames: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
        return torch.cat((inner.apply_pooling(frames).flatten(0, 1), newline[None]))
