"""Model families, one file each; `family_of` finds the family of a model."""

from __future__ import annotations

from torch import nn

from vlmprune.errors import UnsupportedError, did_you_mean
from vlmprune.patches.base import Family
from vlmprune.patches.llava import Llava
from vlmprune.patches.llava_llama import LlavaLlama, LlavaMistral
from vlmprune.patches.llava_next import LlavaNext
from vlmprune.patches.llava_next_video import LlavaNextVideo
from vlmprune.patches.llava_onevision import LlavaOnevision
from vlmprune.patches.qwen2_5_vl import Qwen2_5VL
from vlmprune.patches.qwen2_vl import Qwen2VL
from vlmprune.patches.qwen3_vl import Qwen3VL
from vlmprune.patches.qwen3_vl_moe import Qwen3VLMoe
from vlmprune.patches.vipllava import VipLlava

__all__ = ["FAMILIES", "Family", "family_of"]

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Llava(),
        LlavaNext(),
        LlavaOnevision(),
        LlavaNextVideo(),
        VipLlava(),
        LlavaLlama(),
        LlavaMistral(),
        Qwen2VL(),
        Qwen2_5VL(),
        Qwen3VL(),
        Qwen3VLMoe(),
    )
}


def family_of(model: nn.Module) -> Family:
    """Return the family of a Hugging Face model.

    Raises:
        TypeError: not a Hugging Face model.
        UnsupportedError: no family serves its `model_type`.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is None or not isinstance(model, nn.Module):
        raise TypeError(f"patch needs a Hugging Face model with a config, not {type(model).__name__}.")
    if kind not in FAMILIES:
        known, hint = ", ".join(FAMILIES), did_you_mean(kind, FAMILIES)
        raise UnsupportedError(f"models of type {kind!r} are not supported; supported: {known}.{hint}")
    return FAMILIES[kind]
