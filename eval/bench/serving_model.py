"""A folder that vLLM can serve: a shape with random weights and a tokenizer of numbered words."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from vlmprune.eval.bench.shapes import Shape, build

__all__ = ["save", "with_older_names"]

TOWER, OLDER = "vision_tower.", "vision_tower.vision_model."


def save(shape: Shape, folder: Path) -> None:
    """Write model and processor of a shape.

    Raises:
        ValueError: a family whose processor is not made here.
    """
    config = shape.config()
    if config.model_type not in ("llava", "llava_next"):
        raise ValueError(f"shape {shape.name!r} is a {config.model_type}: --engine vllm takes llava and llava_next.")
    build(shape, "cpu", torch.float32).save_pretrained(folder)
    processor(config).save_pretrained(folder)
    rename(folder / "model.safetensors")


def processor(config: Any) -> Any:
    """A processor for a config: words `w0`, `w1`, ... with the placeholder at its number."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    vision, special = config.vision_config, {0: "<unk>", 1: "<s>", 2: "</s>", config.image_token_index: "<image>"}
    words = {special.get(i, f"w{i}"): i for i in range(config.text_config.vocab_size)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    size = {"shortest_edge": vision.image_size}
    crop = {"height": vision.image_size, "width": vision.image_size}
    told = {
        "tokenizer": tokenizer, "patch_size": vision.patch_size, "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }  # fmt: skip
    if config.model_type == "llava":
        return LlavaProcessor(CLIPImageProcessor(size=size, crop_size=crop), **told)
    pinpoints = config.image_grid_pinpoints
    return LlavaNextProcessor(
        LlavaNextImageProcessor(size=size, crop_size=crop, image_grid_pinpoints=pinpoints), **told
    )


def with_older_names(source: Path, folder: Path) -> None:
    """Copy a model and give its weights the names that vLLM's own classes know."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    rename(folder / "model.safetensors")


def rename(file: Path) -> None:
    """Give weights that transformers 5 saved the names before it, in place."""
    from safetensors.torch import load_file, save_file

    weights = load_file(str(file))
    save_file(
        {n if OLDER in n else n.replace(TOWER, OLDER, 1): w for n, w in weights.items()}, str(file), {"format": "pt"}
    )
