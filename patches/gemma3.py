"""Gemma 3: a picture sees all of itself; patches are averaged by squares; layers with and without a window."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from vlmprune.patches.base import Family

__all__ = ["Gemma3"]


class Gemma3(Family):
    """`Gemma3ForConditionalGeneration`.

    Which tokens are a picture's is told by `token_type_ids`, as the processor makes them.
    """

    model_type = "gemma3"
    title = "Gemma 3 (Gemma3ForConditionalGeneration)"
    usual_tower = "siglip_vision_model"
    usual_unit = 4
    image = "a picture; with pan and scan each crop is a picture of its own"
    kinds = ("token_type_ids",)
    closed = True

    def unit(self, inner: nn.Module) -> int:
        vision = inner.config.vision_config
        return vision.image_size // vision.patch_size // math.isqrt(inner.config.mm_tokens_per_image)

    def blocks(self, kwargs: dict[str, Any]) -> torch.Tensor:
        picture = self.told_kinds(kwargs) == 1
        starts = picture & ~nn.functional.pad(picture, (1, 0))[:, :-1]
        return torch.where(picture, starts.cumsum(1) - 1, -1)

    def said_of(self, inner: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"token_type_ids": (ids == self.token(inner)).long()}

    def processor_fields(self, inner: nn.Module) -> dict[str, Any]:
        return {"image_seq_length": inner.config.mm_tokens_per_image}
