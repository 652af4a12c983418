"""Aya Vision: tiles with their markers between them; a token is a square of patches."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlmprune.patches.base import Family

__all__ = ["AyaVision"]


class AyaVision(Family):
    """`AyaVisionForConditionalGeneration`; the thumbnail is the last tile."""

    model_type = "aya_vision"
    title = "Aya Vision (AyaVisionForConditionalGeneration)"
    usual_tower = "siglip_vision_model"
    usual_unit = 2
    image = "a tile of a picture, the thumbnail a tile as well; their markers are text and stay"

    def unit(self, inner: nn.Module) -> int:
        return inner.config.downsample_factor

    def processor_fields(self, inner: nn.Module) -> dict[str, Any]:
        vision = inner.config.vision_config
        return {"patch_size": vision.patch_size * self.unit(inner), "img_size": vision.image_size}
