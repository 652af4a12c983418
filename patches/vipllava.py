"""ViP-LLaVA: as LLaVA-1.5, with features of five tower layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from vlmprune.errors import UnsupportedError
from vlmprune.parts.facts import ModelFacts
from vlmprune.patches.base import Family

__all__ = ["VipLlava"]


class VipLlava(Family):
    """`VipLlavaForConditionalGeneration`; its code always drops the tower's first token."""

    model_type = "vipllava"
    title = "ViP-LLaVA (VipLlavaForConditionalGeneration)"
    by_formula = True
    fixed = ("vision_feature_layers", "vision_feature_layer")

    def facts(self, inner: nn.Module) -> ModelFacts:
        if (tower := inner.config.vision_config.model_type) == "siglip_vision_model":
            raise UnsupportedError(
                f"vipllava drops the tower's first token, which is a patch of a {tower!r}: use a tower with a [CLS] "
                "token."
            )
        return super().facts(inner)

    def strategy(self, inner: nn.Module) -> str:
        return "default"

    def feature_layer(self, inner: nn.Module) -> int | Sequence[int]:
        return inner.config.vision_feature_layers  # the name that every supported transformers knows
