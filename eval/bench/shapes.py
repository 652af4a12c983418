"""Architectures by name, with random weights made on the device: a claim about speed needs no checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlmprune.errors import did_you_mean

__all__ = ["SHAPES", "Shape", "build", "find_shape"]


def pinpoints(tile: int) -> list[list[int]]:
    """Sizes into which LLaVA-1.6 puts pictures, for tiles of `tile` pixels."""
    return [[tile * down, tile * across] for down, across in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]


CLIP_L = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
VICUNA_7B = {
    "model_type": "llama", "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
SO400M = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26,
    "num_attention_heads": 16, "image_size": 384, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
QWEN2_7B = {
    "model_type": "qwen2", "vocab_size": 152128, "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768,
    "rope_theta": 1e6,
}  # fmt: skip
QWEN2_5_VL_TOWER = {
    "model_type": "qwen2_5_vl_vision", "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
    "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": 3584,
}  # fmt: skip
QWEN2_5_VL_TEXT = {
    "model_type": "qwen2_5_vl_text", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}  # fmt: skip
QWEN3_VL_TOWER = {
    "model_type": "qwen3_vl_vision", "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
    "patch_size": 16, "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24],
    "out_hidden_size": 4096,
}  # fmt: skip
QWEN3_8B = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6,
}  # fmt: skip
QWEN3_VL_TEXT = QWEN3_8B | {
    "model_type": "qwen3_vl_text", "max_position_embeddings": 262144,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True,
    },
}  # fmt: skip
QWEN3_TEXT = QWEN3_8B | {
    "model_type": "qwen3", "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip
INTERN_VIT_300M = {
    "model_type": "internvl_vision", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": [448, 448], "patch_size": [14, 14], "attention_bias": True,
}  # fmt: skip
QWEN_TOKENS = {
    "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
}  # fmt: skip
FEW_TOKENS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
# half the layers, a quarter of the width, heads as wide
QUARTER_QWEN2_5 = {
    "hidden_size": 896, "intermediate_size": 4736, "num_hidden_layers": 14, "num_attention_heads": 7,
    "num_key_value_heads": 1, "vocab_size": 8192,
}  # fmt: skip
QUARTER_QWEN3 = {
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 18, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 8192,
}  # fmt: skip
# LLaVA-1.5-7B at about a twentieth: as many patches, tower layers and nearly as many decoder layers, the same share of
# tower (3 %) and vocabulary (3 %) in the parameters
SMALL_TOWER = {
    "model_type": "clip_vision_model", "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 24,
    "num_attention_heads": 3, "image_size": 192, "patch_size": 8, "projection_dim": 64,
}  # fmt: skip
SMALL_TEXT = {
    "model_type": "llama", "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24,
    "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 4096,
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """An architecture: `config` makes its Hugging Face configuration."""

    name: str
    model_type: str
    what: str
    config: Callable[[], Any]


def composed(model_type: str, vision: dict, text: dict, **options: Any) -> Callable[[], Any]:
    """A function that makes the configuration of a family from those of its parts."""

    def make() -> Any:
        from transformers import AutoConfig

        parts = {
            name: AutoConfig.for_model(**part) for name, part in (("vision_config", vision), ("text_config", text))
        }
        return AutoConfig.for_model(model_type, **parts, **options)

    return make


def embedded(name: str) -> Callable[[], Any]:
    """A function that reads the configuration of an embedded model."""

    def make() -> Any:
        from transformers import AutoConfig

        from vlmprune.eval import testbed

        return AutoConfig.from_pretrained(str(testbed.path(name)), local_files_only=True)

    return make


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape(
            "llava-1.5-7b",
            "llava",
            "CLIP-L/336, Vicuna-7B; 576 patches",
            composed("llava", CLIP_L, VICUNA_7B, image_token_index=32000, image_seq_length=576),
        ),
        Shape(
            "llava-next-7b",
            "llava_next",
            "CLIP-L/336, Vicuna-7B; 672 x 672 pixels are 2880 patches",
            composed("llava_next", CLIP_L, VICUNA_7B, image_token_index=32000, image_grid_pinpoints=pinpoints(336)),
        ),
        Shape(
            "llava-onevision-7b",
            "llava_onevision",
            "SigLIP-so400m/384, Qwen2-7B",
            composed(
                "llava_onevision",
                SO400M,
                QWEN2_7B,
                image_token_index=151646,
                video_token_index=151647,
                vision_feature_layer=-1,
                vision_feature_select_strategy="full",
            ),
        ),
        Shape("scene-llava", "llava", "the embedded model's architecture; 256 patches", embedded("scene-llava")),
        Shape(
            "small",
            "llava",
            "0.3 B language model for two CPU cores; 576 patches",
            composed("llava", SMALL_TOWER, SMALL_TEXT, image_token_index=5, image_seq_length=576),
        ),
        Shape(
            "qwen2.5-vl-7b",
            "qwen2_5_vl",
            "Qwen2.5-VL-7B; 672 x 672 pixels are 576 tokens",
            composed("qwen2_5_vl", QWEN2_5_VL_TOWER, QWEN2_5_VL_TEXT, **QWEN_TOKENS),
        ),
        Shape(
            "qwen3-vl-8b",
            "qwen3_vl",
            "Qwen3-VL-8B; 768 x 768 pixels are 576 tokens",
            composed("qwen3_vl", QWEN3_VL_TOWER, QWEN3_VL_TEXT, **QWEN_TOKENS),
        ),
        Shape(
            "internvl3.5-8b",
            "internvl",
            "InternVL3.5-8B; four tiles and a thumbnail are 1280 tokens",
            composed("internvl", INTERN_VIT_300M, QWEN3_TEXT, image_token_id=151671, tie_word_embeddings=False),
        ),
        Shape(
            "small-qwen2.5-vl",
            "qwen2_5_vl",
            "Qwen2.5-VL-7B at half the depth and a quarter of the width; 576 tokens",
            composed(
                "qwen2_5_vl",
                QWEN2_5_VL_TOWER
                | {"depth": 16, "hidden_size": 320, "intermediate_size": 855, "num_heads": 4, "out_hidden_size": 896}
                | {"fullatt_block_indexes": [3, 7, 11, 15]},
                QWEN2_5_VL_TEXT | QUARTER_QWEN2_5,
                **FEW_TOKENS,
            ),
        ),
        Shape(
            "small-qwen3-vl",
            "qwen3_vl",
            "Qwen3-VL-8B at half the depth and a quarter of the width; 576 tokens",
            composed(
                "qwen3_vl",
                QWEN3_VL_TOWER
                | {"depth": 13, "hidden_size": 288, "intermediate_size": 1076, "num_heads": 4, "out_hidden_size": 1024}
                | {"deepstack_visual_indexes": [4, 8, 12]},
                QWEN3_VL_TEXT | QUARTER_QWEN3,
                **FEW_TOKENS,
            ),
        ),
        Shape(
            "small-internvl",
            "internvl",
            "InternVL3.5-8B at half the depth and a quarter of the width; 1280 tokens",
            composed(
                "internvl",
                INTERN_VIT_300M
                | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 4},
                QWEN3_TEXT | QUARTER_QWEN3,
                image_token_id=5,
                tie_word_embeddings=False,
            ),
        ),
        Shape(
            "small-half",
            "llava",
            "the same with half the decoder layers (0.16 B), for many requests at once",
            composed(
                "llava", SMALL_TOWER, SMALL_TEXT | {"num_hidden_layers": 12}, image_token_index=5, image_seq_length=576
            ),
        ),
        Shape(
            "small-next",
            "llava_next",
            "small with a thumbnail and four crops; 2880 patches",
            composed("llava_next", SMALL_TOWER, SMALL_TEXT, image_token_index=5, image_grid_pinpoints=[[384, 384]]),
        ),
        Shape(
            "small-half-next",
            "llava_next",
            "small-half with a thumbnail and up to four crops, a quarter as large; 720 patches, fewer of fewer crops",
            composed(
                "llava_next",
                SMALL_TOWER | {"image_size": 96},
                SMALL_TEXT | {"num_hidden_layers": 12},
                image_token_index=5,
                image_grid_pinpoints=pinpoints(96),
            ),
        ),
    )
}


def find_shape(name: str) -> Shape:
    """The shape called `name`.

    Raises:
        ValueError: there is none.
    """
    if name not in SHAPES:
        raise ValueError(f"unknown shape {name!r}.{did_you_mean(name, SHAPES)} Known: {', '.join(SHAPES)}.")
    return SHAPES[name]


def build(shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of this shape, its random weights (seed 0) made where they stay.

    Raises:
        MemoryError: the weights alone do not fit.
    """
    from transformers import AutoModelForImageTextToText

    config = shape.config()
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForImageTextToText.from_config(config, dtype=dtype).parameters())
    need, free = parameters * dtype.itemsize, free_memory(device)
    if free is not None and need > free:
        raise MemoryError(
            f"shape {shape.name!r} has {parameters / 1e9:.2f} B parameters: {need / 2**30:.1f} GiB in "
            f"{str(dtype).removeprefix('torch.')}, and {device} has {free / 2**30:.1f} GiB free. "
            "Take a smaller shape or dtype."
        )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None
    return model.eval()


def free_memory(device: str) -> int | None:
    """Bytes that are free on a device, None where nobody tells."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
