"""PaliGemma: one view, one square grid of patches, and a prompt that sees all of itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlmprune.patches.base import Family

__all__ = ["PaliGemma"]


class PaliGemma(Family):
    """`PaliGemmaForConditionalGeneration` with Gemma 1; the host counts positions from 1.

    What is prompt and what answer is told by `token_type_ids` (0 and 1), as the processor makes them.
    """

    model_type = "paligemma"
    title = "PaliGemma (PaliGemmaForConditionalGeneration)"
    usual_tower = "siglip_vision_model"
    kinds = ("token_type_ids",)
    closed = True
    origin = 1

    def blocks(self, kwargs: dict[str, Any]) -> torch.Tensor:
        return torch.where(self.told_kinds(kwargs) == 0, 0, -1)

    def said_of(self, inner: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"token_type_ids": torch.zeros_like(ids)}  # all of it is prompt

    def processor_fields(self, inner: nn.Module) -> dict[str, Any]:
        return {"image_seq_length": self.facts(inner).view_patches}
