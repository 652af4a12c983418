"""Random models with heads that vLLM's attention takes, as folders."""

from __future__ import annotations

import random
from pathlib import Path

import tiny
import tiny_folders
from serving_engine import Prompt

LANGUAGE = {
    "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096,
}  # fmt: skip
MODELS = {
    "onevision": ("llava_onevision", "siglip", "qwen2"),
    "llava-siglip-mistral": ("llava", "siglip", "mistral"),
    "next-mistral": ("llava_next", "clip", "mistral"),
}
# none of a single crop, which is its thumbnail again: between equals, rounding decides
LARGE = (96, 96)  # OneVision shrinks it
SIZES = [(25, 40), (70, 30), (30, 70), LARGE, (90, 50), (20, 96), (48, 48)]


def save(folder: Path, name: str) -> str:
    """Write model and processor; returns the folder."""
    family, tower, text = MODELS[name]
    made = tiny.model(family, text=text, tower=tower, **LANGUAGE)
    made.generation_config.eos_token_id = made.config.text_config.eos_token_id  # at which vLLM ends too
    made.save_pretrained(folder)
    if family == "llava_onevision":
        onevision_processor().save_pretrained(folder)
    else:
        tiny_folders.processor(family, tower).save_pretrained(folder)
    return str(folder)


def onevision_processor():
    """The whole one, with its part for videos, which vLLM asks for."""
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=tiny_folders.CROP, image_grid_pinpoints=tiny.ONEVISION),
        tiny_folders.tokenizer(),
        LlavaOnevisionVideoProcessor(size=tiny_folders.CROP),
        num_image_tokens=tiny.SIDE**2,
        vision_feature_select_strategy="full",
        chat_template=tiny_folders.TEMPLATE.replace("user: ", ""),
        video_token="user:",  # the word of the model's video_token_id
    )


def prompts(count: int, pictures: int = 1, shrunk: bool = True) -> list[Prompt]:
    """Prompts about pictures of noise, of many shapes; `shrunk` says that there may be some whose canvas is shrunk."""
    rng, made = random.Random(0), []
    for i in range(count):
        sizes = SIZES if shrunk else [size for size in SIZES if size != LARGE]
        images = [tiny_folders.noise_picture(*rng.choice(sizes), seed=7 * i + j) for j in range(pictures)]
        question = " ".join(f"word{rng.randrange(40)}" for _ in range(rng.randrange(2, 9)))
        made.append(Prompt(tuple(images), question))
    return made
