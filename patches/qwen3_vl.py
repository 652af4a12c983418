"""Qwen3-VL: features of further tower layers are added behind the first decoder layers (DeepStack)."""

from __future__ import annotations

from vlmprune.patches.qwen2_vl import Qwen2VL

__all__ = ["Qwen3VL"]


class Qwen3VL(Qwen2VL):
    """`Qwen3VLForConditionalGeneration`. Between the frames of a video stands when they were taken."""

    model_type = "qwen3_vl"
    title = "Qwen3-VL (Qwen3VLForConditionalGeneration)"
    usual_tower = "qwen3_vl_vision"
    stamped = True
    injected = ("visual_pos_masks", "deepstack_visual_embeds")
