"""LLaVA-1.5: one view, one square grid of patches, no newlines."""

from __future__ import annotations

from typing import Any

from vlmprune.patches.base import Family
from vlmprune.patches.pixtral import PIXTRAL

__all__ = ["Llava"]


class Llava(Family):
    """`LlavaForConditionalGeneration`; everything is the shared default."""

    model_type = "llava"
    title = "LLaVA-1.5, Pixtral (LlavaForConditionalGeneration)"
    by_formula = True

    def suited(self, config: Any) -> Family:
        return PIXTRAL if config.vision_config.model_type == "pixtral" else self
