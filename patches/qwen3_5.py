"""Qwen3.5: as Qwen2-VL with time stamps in videos, and a language model most of whose layers are recurrent."""

from __future__ import annotations

from vlmprune.patches.qwen2_vl import Qwen2VL

__all__ = ["Qwen3_5"]


class Qwen3_5(Qwen2VL):
    """`Qwen3_5ForConditionalGeneration`.

    A cut cannot take back what a recurrent layer in front of it has read: it shortens what comes behind it.
    """

    model_type = "qwen3_5"
    title = "Qwen3.5 (Qwen3_5ForConditionalGeneration)"
    usual_tower = "qwen3_5_vision"
    usual_attends = 4
    stamped, sparse = True, False
