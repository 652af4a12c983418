"""What vLLM finds: names of architectures, and where their classes are.

Every process of vLLM calls `register`, also those of users who never prune: it imports nothing and cannot raise.
"""

from __future__ import annotations

import logging

__all__ = ["ARCHITECTURES", "register"]

#: `model_type` -> our architecture. Names of our own: were the plugin not loaded, vLLM would refuse them, while under
#: vLLM's names it would serve the model unpruned without a word.
ARCHITECTURES = {
    "llava": "VlmpruneLlavaForConditionalGeneration",
    "llava_next": "VlmpruneLlavaNextForConditionalGeneration",
    "llava_onevision": "VlmpruneLlavaOnevisionForConditionalGeneration",
    "qwen2_5_vl": "VlmpruneQwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "VlmpruneQwen3VLForConditionalGeneration",
    "internvl": "VlmpruneInternVLForConditionalGeneration",
}


def register() -> None:
    """Make our architectures known to vLLM, by name: their classes are imported where a model asks for them."""
    try:
        from vllm import ModelRegistry

        for name in ARCHITECTURES.values():
            ModelRegistry.register_model(name, f"vlmprune.serving.models:{name}")
    except Exception:  # an unknown vLLM: whoever asks for pruning is told that the architecture is unknown
        logging.getLogger("vllm").warning("vlmprune could not register its architectures", exc_info=True)
