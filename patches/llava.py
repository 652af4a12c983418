"""LLaVA-1.5: one view, one square grid of patches, no newlines."""

from __future__ import annotations

from vlmprune.patches.base import Family

__all__ = ["Llava"]


class Llava(Family):
    """`LlavaForConditionalGeneration`; everything is the shared default."""

    model_type = "llava"
    title = "LLaVA-1.5 (LlavaForConditionalGeneration)"
