"""Idefics3: what SmolVLM was made of."""

from __future__ import annotations

from vlmprune.patches.smolvlm import SmolVLM

__all__ = ["Idefics3"]


class Idefics3(SmolVLM):
    """`Idefics3ForConditionalGeneration`."""

    model_type = "idefics3"
    title = "Idefics3 (Idefics3ForConditionalGeneration)"
    usual_tower = "idefics3_vision"
    usual_unit = 2
