"""DeepSeek-VL: one view, one square grid of patches."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlmprune.patches.base import Family

__all__ = ["DeepseekVL"]


class DeepseekVL(Family):
    """`DeepseekVLForConditionalGeneration`; the hybrid one, with a second tower, is another `model_type`."""

    model_type = "deepseek_vl"
    title = "DeepSeek-VL (DeepseekVLForConditionalGeneration)"
    usual_tower = "siglip_vision_model"
    trunk = "vision_model"
    projector = "aligner"
    closed = True

    def processor_fields(self, inner: nn.Module) -> dict[str, Any]:
        return {"num_image_tokens": self.facts(inner).view_patches}
