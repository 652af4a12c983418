"""SmolVLM: tiles with markers between them, all pictures of a row in one list; a token is a square of patches."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from vlmprune.patches.base import Family

__all__ = ["SmolVLM"]


class SmolVLM(Family):
    """`SmolVLMForConditionalGeneration`.

    Tiles come by the row they belong to, and rows with less of them are filled up with black ones, which the host drops
    before its tower. What it makes of a row is one item, in which every tile has as many tokens.
    """

    model_type = "smolvlm"
    title = "SmolVLM, SmolVLM2 (SmolVLMForConditionalGeneration)"
    usual_tower = "smolvlm_vision"
    usual_unit = 4
    image = "a tile of a picture, or a frame of a video; the whole picture, last, is a tile; markers are text and stay"
    trunk = "vision_model"
    projector = "connector"
    text = "text_model"
    handing = False
    listed = True
    closed = True

    def unit(self, inner: nn.Module) -> int:
        return inner.config.scale_factor

    def items(self, inner: nn.Module, modality: str, features: Any, known: list[Any]) -> list[int]:
        tile = math.prod(self.side(inner))
        return [tile] * (sum(len(row) for row in features.pooler_output) // tile)

    def processor_fields(self, inner: nn.Module) -> dict[str, Any]:
        return {"image_seq_len": math.prod(self.side(inner))}
