"""Ovis2: tiles with markers between them; a token is a mixture of visual words, told by a square of patches."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlmprune.patches.base import Family

__all__ = ["Ovis2"]


class Ovis2(Family):
    """`Ovis2ForConditionalGeneration`."""

    model_type = "ovis2"
    title = "Ovis2 (Ovis2ForConditionalGeneration)"
    usual_tower = "ovis2_vision"
    projector = "visual_embeddings_table"
    usual_unit = 2
    image = "a tile of a picture; the whole picture, first, is a tile; markers are text and stay"
    closed = True

    def tower_layers(self, tower: nn.Module) -> nn.ModuleList:
        return tower.transformer.encoder.layers

    def unit(self, inner: nn.Module) -> int:
        return inner.config.vision_config.hidden_stride

    def processor_fields(self, inner: nn.Module) -> dict[str, Any]:
        return {"image_seq_length": self.facts(inner).view_patches}
