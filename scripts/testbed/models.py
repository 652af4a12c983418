"""Builds the two embedded models and their processors: plain transformers classes, small numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vlmprune.eval.testbed.words import CHAT_TEMPLATE, VOCABULARY

from .scenes import GRID, PATCH, TILE
from .tower import PIXEL_MEAN, PIXEL_STD, tower_config

#: Tile grids of scene-llava-next, as (height, width) in pixels.
PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]


def tokenizer(vocabulary: Sequence[str] = VOCABULARY, **marks: str) -> PreTrainedTokenizerFast:
    """One token a word; upper case is folded and punctuation split off, anything unknown becomes <unk>.

    `marks` are further special tokens by the name that processors ask for.
    """
    words = {word: i for i, word in enumerate(vocabulary)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[?.,!]"), "isolated")]
    )
    inner.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"} | marks,
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def text_config(**changes) -> LlamaConfig:
    """The language model's configuration."""
    index = VOCABULARY.index
    values = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "bos_token_id": index("<s>"),
        "eos_token_id": index("</s>"),
        "pad_token_id": index("<pad>"),
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**values | changes)


def _shared(text: LlamaConfig) -> dict:
    return {
        "vision_config": tower_config(),
        "text_config": text,
        "image_token_index": VOCABULARY.index("<image>"),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
    }


def llava(text: LlamaConfig | None = None) -> LlavaForConditionalGeneration:
    """An untrained scene-llava: 256 visual tokens a picture."""
    config = LlavaConfig(**_shared(text or text_config()), image_seq_length=GRID * GRID)
    return LlavaForConditionalGeneration(config)


def llava_next(text: LlamaConfig | None = None) -> LlavaNextForConditionalGeneration:
    """An untrained scene-llava-next: thumbnail and up to four crops of 256 tokens each."""
    config = LlavaNextConfig(**_shared(text or text_config()), image_grid_pinpoints=PINPOINTS)
    return LlavaNextForConditionalGeneration(config)


def _picture_settings() -> dict:
    return {
        "size": {"shortest_edge": TILE},
        "crop_size": {"height": TILE, "width": TILE},
        "image_mean": [PIXEL_MEAN] * 3,
        "image_std": [PIXEL_STD] * 3,
    }


def _processor(kind: type, image_processor: Any) -> Any:
    return kind(
        image_processor,
        tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def llava_processor() -> LlavaProcessor:
    """The processor that goes with `llava`."""
    return _processor(LlavaProcessor, CLIPImageProcessor(**_picture_settings()))


def llava_next_processor() -> LlavaNextProcessor:
    """The processor that goes with `llava_next`."""
    from transformers import LlavaNextImageProcessor

    pictures = LlavaNextImageProcessor(**_picture_settings(), image_grid_pinpoints=PINPOINTS)
    return _processor(LlavaNextProcessor, pictures)
