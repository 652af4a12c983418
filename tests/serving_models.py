"""Random models with heads that vLLM's attention takes, as folders."""

from __future__ import annotations

import random
from pathlib import Path

import kin.family
import kin.models
import tiny
import tiny_folders
import tiny_qwen
import torch
import transformers
from serving_engine import Prompt

LANGUAGE = {
    "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096,
}  # fmt: skip
MODELS = {
    "onevision": ("llava_onevision", "siglip", "qwen2"),
    "llava-siglip-mistral": ("llava", "siglip", "mistral"),
    "next-mistral": ("llava_next", "clip", "mistral"),
}
# models of other builds, by their family
OTHERS = ("qwen2_5_vl", "qwen3_vl", "internvl", "internvl-qwen3")
QWEN = {
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen3_vl": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
}
AXES = {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 30.0, "mrope_section": [6, 5, 5]}}
OPENS, CLOSES = (f"word{tiny.VOCAB - len(tiny_folders.WORDS) - behind}" for behind in (2, 1))  # of the last two ids
# none of a single crop, which is its thumbnail again: between equals, rounding decides
LARGE = (96, 96)  # OneVision shrinks it
SIZES = [(25, 40), (70, 30), (30, 70), LARGE, (90, 50), (20, 96), (48, 48)]


def save(folder: Path, name: str) -> str:
    """Write model and processor; returns the folder."""
    if name in OTHERS:
        return save_other(folder, name)
    family, tower, text = MODELS[name]
    made = tiny.model(family, text=text, tower=tower, **LANGUAGE)
    made.generation_config.eos_token_id = made.config.text_config.eos_token_id  # at which vLLM ends too
    made.save_pretrained(folder)
    if family == "llava_onevision":
        onevision_processor().save_pretrained(folder)
    else:
        tiny_folders.processor(family, tower).save_pretrained(folder)
    return str(folder)


def save_other(folder: Path, name: str) -> str:
    """Write a model of another build, and its processor; returns the folder."""
    if name in tiny_qwen.CLASSES:
        made, reads = tiny_qwen.model(name, **LANGUAGE | AXES), qwen_processor(name)
        # as published, for vLLM; transformers knows no other way
        made.config.text_config.rope_parameters["mrope_interleaved"] = name == "qwen3_vl"
    else:
        torch.manual_seed(0)
        made, reads = kin.family.lively(kin.KIN[name].build(language=LANGUAGE | {"head_dim": 32})), internvl_processor()
    made.generation_config.eos_token_id = made.config.text_config.eos_token_id
    made.save_pretrained(folder)
    reads.save_pretrained(folder)
    return str(folder)


def qwen_processor(family: str):
    """Of pictures of any size up to 12 x 12 tokens."""
    kind, video = QWEN[family]
    told = {
        "patch_size": tiny_qwen.PATCH, "merge_size": tiny_qwen.MERGE, "temporal_patch_size": 2,
        "size": {"shortest_edge": 4 * tiny_qwen.TOKEN**2, "longest_edge": 144 * tiny_qwen.TOKEN**2},
    }  # fmt: skip
    start, end, image, film = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
    other = {OPENS: start, CLOSES: end, "<image>": image, "user:": film}  # vLLM writes some as they are published
    words = tiny_folders.tokenizer(other, video_token=film, vision_start_token=start, vision_end_token=end)
    template = tiny_folders.TEMPLATE.replace("user: ", "").replace("<image>", f"{start} {image} {end}")
    images, videos = transformers.Qwen2VLImageProcessor(**told), getattr(transformers, video)(**told)
    return getattr(transformers, kind)(images, words, videos, chat_template=template)


def internvl_processor():
    """Of pictures with up to four tiles and a thumbnail."""
    size = {"height": kin.models.SIDE, "width": kin.models.SIDE}
    words = tiny_folders.tokenizer(
        context_image_token="<image>", start_image_token=OPENS, end_image_token=CLOSES, video_token="user:"
    )
    return transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=size, min_patches=1, max_patches=4, crop_to_patches=True), words,
        transformers.InternVLVideoProcessor(size=size), image_seq_length=9,
        chat_template=tiny_folders.TEMPLATE.replace("user: ", ""),
    )  # fmt: skip


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
