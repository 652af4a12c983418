"""Mistral Small 3: LLaVA with a Pixtral tower, whose patches are merged by squares."""

from __future__ import annotations

from torch import nn

from vlmprune.patches.pixtral import LlavaPixtral

__all__ = ["Mistral3"]


class Mistral3(LlavaPixtral):
    """`Mistral3ForConditionalGeneration`."""

    model_type = "mistral3"
    title = "Mistral Small 3.1, 3.2 (Mistral3ForConditionalGeneration)"
    usual_tower = "pixtral"
    usual_unit = 2
    image = "a picture of any size; the break behind each of its rows is text and stays"

    def unit(self, inner: nn.Module) -> int:
        return inner.config.spatial_merge_size
