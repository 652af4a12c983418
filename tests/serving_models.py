"""Random models with heads that vLLM's attention takes, as folders."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import tiny
import tiny_folders
from serving_engine import Prompt

from vlmprune import embedded

LANGUAGE = {
    "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096,
}  # fmt: skip
MODELS = {
    "onevision": ("llava_onevision", "siglip", "qwen2"),
    "llava-siglip-mistral": ("llava", "siglip", "mistral"),
    "next-mistral": ("llava_next", "clip", "mistral"),
}
SIZES = [(24, 24), (70, 30), (30, 70), (96, 96), (90, 50), (20, 96), (48, 48)]


def save(folder: Path, name: str) -> str:
    """Write model and processor; returns the folder."""
    family, tower, text = MODELS[name]
    tiny.model(family, text=text, tower=tower, **LANGUAGE).save_pretrained(folder)
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


def with_older_names(model: str, folder: Path) -> str:
    """A copy of an embedded model whose weights have the names that vLLM's own classes know; returns the folder."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(embedded.path(model), folder, dirs_exist_ok=True)
    file, tower = str(folder / "model.safetensors"), "vision_tower."
    weights = {
        name.replace(tower, f"{tower}vision_model.", 1) if f"{tower}vision_model." not in name else name: value
        for name, value in load_file(file).items()
    }
    save_file(weights, file, {"format": "pt"})
    return str(folder)


def prompts(count: int, pictures: int = 1) -> list[Prompt]:
    """Prompts about pictures of noise, of many shapes."""
    rng, made = random.Random(0), []
    for i in range(count):
        images = [tiny_folders.noise_picture(*rng.choice(SIZES), seed=7 * i + j) for j in range(pictures)]
        question = " ".join(f"word{rng.randrange(40)}" for _ in range(rng.randrange(2, 9)))
        made.append(Prompt(tuple(images), question))
    return made
