"""Tiny models of the families beyond LLaVA, and the pictures that each reads."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from tiny import IMAGE, PAD, VIDEO, VOCAB
from torch import nn

from kin.family import noise

SIDE, PATCH = 36, 6  # pixels of a view, of a patch
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": PAD,
}  # fmt: skip
VISION = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": SIDE,
    "patch_size": PATCH,
}  # fmt: skip


def built(name: str, vision: Any, text: Any, **options) -> nn.Module:
    """A model of a family by the name that its classes begin with."""
    import transformers

    config, kind = (getattr(transformers, f"{name}{end}") for end in ("Config", "ForConditionalGeneration"))
    return kind(config(vision_config=vision, text_config=text, tie_word_embeddings=False, **options))


def siglip(**options) -> Any:
    """A SigLIP tower without a head."""
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(**VISION | options, vision_use_head=False)


def cohere2() -> Any:
    """A language model whose layers take turns."""
    from transformers import Cohere2Config

    return Cohere2Config(**TEXT, sliding_window=12, layer_types=MIXED)


def mistral() -> Any:
    """A language model without a window."""
    from transformers import MistralConfig

    return MistralConfig(**TEXT, sliding_window=None)


def internvl(text: str = "qwen2", language: dict | None = None, **options) -> nn.Module:
    from transformers import Qwen2Config, Qwen3Config

    kind = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}[text]
    vision = VISION | {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH], "use_qk_norm": text == "qwen3"}
    return built("InternVL", vision, kind(**TEXT | (language or {})), image_token_id=IMAGE, **options)


TILES = [1, 3, 2]  # of a picture, by its number


def tiles(model: nn.Module, images: list[int], videos: list[int], seed: int) -> dict:
    """Tiles of several pictures side by side."""
    made = [noise(TILES[n], 3, SIDE, SIDE, seed=seed + 50 + 7 * i) for i, n in enumerate(images)]
    return {"pixel_values": torch.cat(made)}


def parts(n: int) -> list[int]:
    """Placeholders of every tile of a picture, where text stands between them."""
    return [9] * TILES[n]


def aya_vision(**options) -> nn.Module:
    fixed = {"image_token_index": IMAGE, "downsample_factor": 2, "adapter_layer_norm_eps": 1e-6}
    return built("AyaVision", siglip(), cohere2(), **fixed, **options)


def cohere2_vision(**options) -> nn.Module:
    fixed = {"image_token_id": IMAGE, "alignment_intermediate_size": 48}
    return built("Cohere2Vision", siglip(), cohere2(), **fixed, **options)


def deepseek_vl(**options) -> nn.Module:
    from transformers import LlamaConfig

    return built("DeepseekVL", siglip(image_size=24), LlamaConfig(**TEXT), image_token_id=IMAGE, **options)


def views(model: nn.Module, images: list[int], videos: list[int], seed: int) -> dict:
    """Pictures of one view each, and videos of two frames."""
    side, given = 24, {}
    if images:
        # as Video-LLaVA called it before transformers 5.23
        old = "pixel_values" not in signature(model.model.get_image_features).parameters
        name = "pixel_values_images" if old else "pixel_values"
        given[name] = torch.cat([noise(1, 3, side, side, seed=seed + 50 + 7 * n) for n in images])
    if videos:
        given["pixel_values_videos"] = torch.cat([noise(1, 2, 3, side, side, seed=seed + 90 + 7 * n) for n in videos])
    return given


SIZES = [(48, 24), (24, 48), (48, 48)]  # pixels of a picture, by its number


def pixtral(model: nn.Module, images: list[int], videos: list[int], seed: int) -> dict:
    """Pictures of any size, filled up to the largest height and width."""
    shown = [noise(1, 3, *SIZES[n], seed=seed + 50 + 7 * n) for n in images]
    return side_by_side([{"pixel_values": x, "image_sizes": torch.tensor([x.shape[-2:]])} for x in shown])


def side_by_side(shown: list[dict]) -> dict:
    """Pixels of any size as one tensor."""
    shown = [each for each in shown if each]
    height, width = (max(each["pixel_values"].shape[axis] for each in shown) for axis in (-2, -1))
    pixels = [
        nn.functional.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]))
        for x in (each["pixel_values"] for each in shown)
    ]
    return {"pixel_values": torch.cat(pixels), "image_sizes": torch.cat([each["image_sizes"] for each in shown])}


def grid(step: int) -> Callable[[int], list[int]]:
    """Placeholders of every row of a picture, by its number, where a break stands behind each."""
    return lambda n: [SIZES[n][1] // step] * (SIZES[n][0] // step)


def mistral3(**options) -> nn.Module:
    from transformers import PixtralVisionConfig

    fixed = {"image_token_index": IMAGE, "spatial_merge_size": 2}
    return built("Mistral3", PixtralVisionConfig(**VISION), mistral(), **fixed, **options)


def llava_pixtral(**options) -> nn.Module:
    from transformers import PixtralVisionConfig

    fixed = {"image_token_index": IMAGE, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    return built("Llava", PixtralVisionConfig(**VISION), mistral(), **fixed, **options)


def smolvlm(family: str = "SmolVLM", **options) -> nn.Module:
    from transformers import LlamaConfig

    # transformers 5.20 wants the tokens of a prompt to be a multiple of patch_size
    fixed = {"image_token_id": IMAGE, "scale_factor": 4, "pad_token_id": PAD}
    return built(family, VISION | {"patch_size": 3}, LlamaConfig(**TEXT), **fixed, **options)


def listed(model: nn.Module, images: list[int], videos: list[int], seed: int) -> dict:
    """The tiles of all pictures of a row in one list."""
    return {"pixel_values": tiles(model, images, videos, seed)["pixel_values"][None]}


def filled_up(shown: list[dict]) -> dict:
    """Lists of tiles of several rows, the shorter ones filled up with black tiles."""
    given = [each["pixel_values"][0] if each else torch.zeros(0, 3, SIDE, SIDE, dtype=torch.float64) for each in shown]
    most = max(len(x) for x in given)
    return {"pixel_values": torch.stack([torch.cat((x, x.new_zeros(most - len(x), *x.shape[1:]))) for x in given])}


def ovis2(**options) -> nn.Module:
    from transformers import Qwen2Config

    vision = VISION | {"hidden_stride": 2, "vocab_size": 40}
    fixed = {"image_token_id": IMAGE, "vocab_size": VOCAB, "hidden_size": TEXT["hidden_size"]}
    marks = [7, 60, 61, 62, 63]
    return built("Ovis2", vision, Qwen2Config(**TEXT), **fixed, visual_indicator_token_ids=marks, **options)


def video_llava(**options) -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig

    vision = CLIPVisionConfig(**VISION | {"image_size": 24}, projection_dim=16)
    fixed = {"image_token_index": IMAGE, "video_token_index": VIDEO}
    return built("VideoLlava", vision, LlamaConfig(**TEXT), **fixed, **options)


def gemma3(window: int = 24, **options) -> nn.Module:
    from transformers import Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    text = Gemma3TextConfig(**TEXT, sliding_window=window, layer_types=kinds, query_pre_attn_scalar=8)
    return built("Gemma3", siglip(), text, image_token_index=IMAGE, mm_tokens_per_image=9, **options)


def paligemma(**options) -> nn.Module:
    from transformers import GemmaConfig

    fixed = {"image_token_index": IMAGE, "projection_dim": 32, "hidden_size": 32}
    return built("PaliGemma", siglip(image_size=24), GemmaConfig(**TEXT), **fixed, **options)


def squares(model: nn.Module, images: list[int], videos: list[int], seed: int) -> dict:
    """Pictures of one view each, of the side of a tile."""
    return {"pixel_values": torch.cat([noise(1, 3, SIDE, SIDE, seed=seed + 50 + 7 * n) for n in images])}


MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
