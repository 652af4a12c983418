"""Qwen3-VL with experts."""

from __future__ import annotations

from vlmprune.patches.qwen3_vl import Qwen3VL

__all__ = ["Qwen3VLMoe"]


class Qwen3VLMoe(Qwen3VL):
    """`Qwen3VLMoeForConditionalGeneration`."""

    model_type = "qwen3_vl_moe"
    title = "Qwen3-VL with experts (Qwen3VLMoeForConditionalGeneration)"
    usual_tower = "qwen3_vl_moe_vision"
