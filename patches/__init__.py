"""Model families, one file each; `family_of` finds the family of a model."""

from __future__ import annotations

from torch import nn

from vlmprune.errors import UnsupportedError, did_you_mean
from vlmprune.patches.aya_vision import AyaVision
from vlmprune.patches.base import Family
from vlmprune.patches.cohere2_vision import Cohere2Vision
from vlmprune.patches.deepseek_vl import DeepseekVL
from vlmprune.patches.gemma3 import Gemma3
from vlmprune.patches.glm4v import Glm4v
from vlmprune.patches.idefics3 import Idefics3
from vlmprune.patches.internvl import InternVL
from vlmprune.patches.llava import Llava
from vlmprune.patches.llava_llama import LlavaLlama, LlavaMistral
from vlmprune.patches.llava_next import LlavaNext
from vlmprune.patches.llava_next_video import LlavaNextVideo
from vlmprune.patches.llava_onevision import LlavaOnevision
from vlmprune.patches.mistral3 import Mistral3
from vlmprune.patches.ovis2 import Ovis2
from vlmprune.patches.paligemma import PaliGemma
from vlmprune.patches.qwen2_5_vl import Qwen2_5VL
from vlmprune.patches.qwen2_vl import Qwen2VL
from vlmprune.patches.qwen3_5 import Qwen3_5
from vlmprune.patches.qwen3_vl import Qwen3VL
from vlmprune.patches.qwen3_vl_moe import Qwen3VLMoe
from vlmprune.patches.smolvlm import SmolVLM
from vlmprune.patches.video_llava import VideoLlava
from vlmprune.patches.vipllava import VipLlava

__all__ = ["FAMILIES", "REFUSED", "Family", "family_of"]

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Llava(),
        LlavaNext(),
        LlavaOnevision(),
        LlavaNextVideo(),
        VipLlava(),
        VideoLlava(),
        InternVL(),
        Mistral3(),
        DeepseekVL(),
        AyaVision(),
        Cohere2Vision(),
        SmolVLM(),
        Idefics3(),
        Ovis2(),
        Gemma3(),
        PaliGemma(),
        LlavaLlama(),
        LlavaMistral(),
        Qwen2VL(),
        Qwen2_5VL(),
        Qwen3VL(),
        Qwen3VLMoe(),
        Glm4v(),
        Qwen3_5(),
    )
}


#: Families that are refused, and why.
REFUSED: dict[str, str] = {
    "gemma3n": "its hidden states have a dimension more than the sequence, and layers reuse keys of earlier ones",
    "gemma4": "layers get an input of their own for every token, reuse keys of earlier ones, and drop positions",
    "llama4": "it has no inner model that joins tower and language model, and its attention is cut into chunks",
    "mllama": "its pictures are no tokens of the sequence: layers look at them by cross attention",
    "florence2": "its language model reads pictures by an encoder of its own",
    "blip_2": "a Q-former makes few tokens of a picture already",
    "instructblip": "a Q-former makes few tokens of a picture already",
    "instructblipvideo": "a Q-former makes few tokens of a picture already",
    "fast_vlm": "its tower is a timm model, which this project does not install and has not run",
    "perception_lm": "its tower is a timm model, which this project does not install and has not run",
    "lfm2_vl": "some of its layers are convolutions, which have no attention; not supported yet",
    "minicpmv4_6": "most of its layers are recurrent; not supported yet",
    "kimi_k25": "its language model keeps keys of all heads as one latent vector; not supported yet",
    "granite4_vision": "features enter the language model behind its first layer, and again behind others; "
    "not supported yet",
    "molmo2": "features are added to the placeholders' embeddings; not supported yet",
    "video_llama_3": "its video features are thinned out before they are placed; not supported yet",
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
    if kind in REFUSED:
        raise UnsupportedError(f"models of type {kind!r} are not supported: {REFUSED[kind]}.")
    if kind not in FAMILIES:
        known, hint = ", ".join(FAMILIES), did_you_mean(kind, FAMILIES)
        raise UnsupportedError(f"models of type {kind!r} are not supported; supported: {known}.{hint}")
    return FAMILIES[kind].suited(model.config)
