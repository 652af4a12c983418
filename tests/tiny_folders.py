"""Tiny random models (see tiny.py) as folders with processors, as a user would have them on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tiny
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)

import vlmprune

WORDS = ["<unk>", "<s>", "</s>", "<pad>", "user:", "<image>", "assistant:", "what", "colour", "is", "it", "?"]
WORDS.append("<video>")
VIDEO = WORDS.index("<video>")  # the placeholder of a folder's model, whose vocabulary has a word where tiny.VIDEO is
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}user: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% elif part['type'] == 'video' %}<video> {% else %}{{ part['text'] }} "
    "{% endif %}{% endfor %}{% endfor %}assistant:"
)
SIZE = {"shortest_edge": tiny.TILE}
CROP = {"height": tiny.TILE, "width": tiny.TILE}
PICTURES = {"a.png": (24, 24), "b.jpg": (48, 24), "c.WEBP": (30, 50), "d.png": (24, 48)}  # a folder of them, by name


class LlavaOnevisionProcessor(transformers.LlavaOnevisionProcessor):
    """The real one without its part for videos, which needs torchvision; saved under the real one's name."""

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]


def tokenizer(other=None, **named):
    """Of the words, some of which may have `other` spellings; `named` are further special ones of them."""
    words = WORDS + [f"word{i}" for i in range(tiny.VOCAB - len(WORDS))]
    words = [(other or {}).get(word, word) for word in words]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        extra_special_tokens={"image_token": words[tiny.IMAGE], "video_token": "<video>"} | named, padding_side="left",
    )  # fmt: skip


def processor(family="llava", tower="clip"):
    if family == "llava_onevision":
        pictures = LlavaOnevisionImageProcessorPil(size=CROP, image_grid_pinpoints=tiny.ONEVISION)
        return LlavaOnevisionProcessor(
            pictures, tokenizer(), num_image_tokens=tiny.SIDE**2, vision_feature_select_strategy="full",
            chat_template=TEMPLATE,
        )  # fmt: skip
    shared = {
        "tokenizer": tokenizer(), "patch_size": tiny.PATCH, "chat_template": TEMPLATE,
        "vision_feature_select_strategy": "default" if tower == "clip" else "full",
        "num_additional_image_tokens": int(tower == "clip"),
    }  # fmt: skip
    if family == "llava_next":
        pictures = LlavaNextImageProcessorPil(size=SIZE, crop_size=CROP, image_grid_pinpoints=tiny.PINPOINTS)
        return LlavaNextProcessor(pictures, **shared)
    if tower == "siglip":
        return LlavaProcessor(SiglipImageProcessorPil(size=CROP), **shared)
    return LlavaProcessor(CLIPImageProcessorPil(size=SIZE, crop_size=CROP), **shared)


def save(folder: Path, family="llava", tower="clip"):
    """Write model and processor; returns the folder."""
    made = tiny.model(family, tower=tower)
    made.generation_config.max_new_tokens = 8
    if family in tiny.VIDEOS:
        made.config.video_token_id = VIDEO
    made.save_pretrained(folder)
    processor(family, tower).save_pretrained(folder)
    return folder


def noise_picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@torch.no_grad()
def answer(folder, picture, prompt, longest, method=None, **options):
    """What a model says to a prompt about a picture file, without any of the command's code."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    reads = AutoProcessor.from_pretrained(folder)
    text, image = f"<s>user: <image> {prompt} assistant:", Image.open(picture).convert("RGB")
    inputs = reads(text=text, images=[image], return_tensors="pt", add_special_tokens=False)
    if method:
        vlmprune.patch(model, method, **options)
    made = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
    return reads.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()
