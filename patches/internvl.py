"""InternVL: tiles and a thumbnail behind them, all one picture; a token is two by two patches."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlmprune.patches.base import Family

__all__ = ["InternVL"]


class InternVL(Family):
    """`InternVLForConditionalGeneration`.

    Its processor writes a picture's tiles, the thumbnail last, as one run of placeholders, and a video as a picture per
    frame. The model is not told rows and columns of tiles: all of them are alike here.
    """

    model_type = "internvl"
    title = "InternVL 2.5, 3, 3.5 (InternVLForConditionalGeneration)"
    usual_tower = "internvl_vision"
    usual_unit = 2
    image = "a picture with all its tiles, the thumbnail among them; a frame of a video is a picture"
    handing = False
    closed = True
    runs = True

    def tower_layers(self, tower: nn.Module) -> nn.ModuleList:
        return tower.encoder.layer

    def unit(self, inner: nn.Module) -> int:
        return round(1 / inner.config.downsample_ratio)

    def side(self, inner: nn.Module, size: Any = None) -> tuple[int, int]:
        vision, unit = inner.config.vision_config, self.unit(inner)
        (height, width), (down, across) = vision.image_size, vision.patch_size
        return height // down // unit, width // across // unit

    def processor_fields(self, inner: nn.Module) -> dict[str, Any]:
        return {"image_seq_length": self.facts(inner).view_patches}
