"""Cohere 2 Vision: tiles with line breaks between them; a token is a square of patches."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlmprune.patches.aya_vision import AyaVision

__all__ = ["Cohere2Vision"]


class Cohere2Vision(AyaVision):
    """`Cohere2VisionForConditionalGeneration`, whose features are what leaves the tower at its end."""

    model_type = "cohere2_vision"
    title = "Command A Vision (Cohere2VisionForConditionalGeneration)"
    image = "a tile of a picture, the thumbnail a tile as well; the breaks between them are text and stay"
    closed = True

    def processor_fields(self, inner: nn.Module) -> dict[str, Any]:
        return {"patch_size": self.side(inner)[0]}
