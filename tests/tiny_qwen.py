"""Tiny random models of the Qwen-VL families: pictures of any size, in windows of 2 x 2 tokens where there are any."""

from __future__ import annotations

import torch
import transformers
from tiny import IMAGE, LAYERS, PAD, VIDEO, VOCAB

PATCH, MERGE = 4, 2  # pixels of a patch, patches along a token's side
TOKEN = PATCH * MERGE
FULL = (1, 4)  # tower layers of qwen2_5_vl that see all of a picture; the last, the feature layer, does not
DEPTH = 6
CLASSES = {
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", "Qwen2VLConfig"),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig"),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", "Qwen3VLConfig"),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeConfig"),
    "glm4v": ("Glm4vForConditionalGeneration", "Glm4vConfig"),
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", "Qwen3_5Config"),
}
STAMPED = ("qwen3_vl", "qwen3_vl_moe", "glm4v", "qwen3_5")  # in whose videos text stands in front of every frame
STAMP = 2  # tokens of it
SECONDS = 0.5  # between the frames of a qwen2_5_vl video


def model(family, dtype=torch.float32, seed=0, attn="sdpa", **text_options):
    """A random model whose outputs depend strongly on its picture, and on every axis of its positions."""
    torch.manual_seed(seed)
    vision = {
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "depth": DEPTH,
        "num_heads": 2,
    }
    into = text_options.get("hidden_size", 32)
    if family == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": into, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": into}
    if family == "qwen2_5_vl":
        vision |= {"window_size": 2 * TOKEN, "fullatt_block_indexes": list(FULL)}
    if family == "qwen3_5":
        vision |= {"num_position_embeddings": 36}
    elif family.startswith("qwen3"):
        vision |= {"deepstack_visual_indexes": [1, 3], "num_position_embeddings": 36}
    text = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": PAD, "head_dim": 8,
        # with the usual base the last axes would hardly turn anything
        "rope_parameters": {"rope_type": "default", "rope_theta": 30.0, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    if family == "qwen3_5":
        text |= {
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
            "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "head_dim": 16,
        }  # fmt: skip
        text["rope_parameters"]["partial_rotary_factor"] = 0.5
    if family == "glm4v":
        vision |= {"image_size": 24, "rms_norm_eps": 1e-6}
        text["num_attention_heads"], text["num_key_value_heads"] = 2, 1
        text["rope_parameters"]["partial_rotary_factor"] = 0.5  # as published
        del text["head_dim"]
    if family == "qwen3_vl_moe":
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 2}
    kind, config = (getattr(transformers, name) for name in CLASSES[family])
    made = kind(
        config(
            vision_config=vision, text_config=text | text_options, image_token_id=IMAGE, video_token_id=VIDEO,
            vision_start_token_id=VOCAB - 2, vision_end_token_id=VOCAB - 1, attn_implementation=attn,
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.ndim > 1:  # the default init hardly reacts to anything
                weight.mul_(4.0 if "embed" not in name else 12.0)
    if family == "qwen3_vl_moe" and dtype == torch.float64:
        made.set_experts_implementation("eager")  # the others have no float64
    made.generation_config.eos_token_id = None
    return made.to(dtype).eval()


def grid(size, frames=1):
    """(frames, rows, columns) of patches of a picture of `size` (height, width) in pixels."""
    return frames, *(MERGE * max(1, round(side / TOKEN)) for side in size)


def pixels(made, sizes, seed=0):
    """Random patches of images of `sizes`, as the processor would shape them."""
    return packed(made, [grid(size) for size in sizes], seed, "pixel_values", "image_grid_thw")


def video_pixels(made, videos, seed=0):
    """The same of videos with so many frames each, two to three tokens large."""
    given = packed(
        made, [grid((16, 24), frames) for frames in videos], seed + 60, "pixel_values_videos", "video_grid_thw"
    )
    if made.config.model_type == "qwen2_5_vl":
        given["second_per_grid_ts"] = torch.full((len(videos),), SECONDS)
    return given


def packed(made, grids, seed, pixels, sizes):
    generator = torch.Generator().manual_seed(seed)
    count = sum(t * rows * cols for t, rows, cols in grids)
    values = torch.randn(count, 3 * 2 * PATCH * PATCH, generator=generator)
    return {pixels: values.to(made.dtype), sizes: torch.tensor(grids)}


def repeated(made, prompt):
    """A prompt whose pictures repeat themselves, as screens do: from the middle on every row has one token's pixels."""
    prompt = dict(prompt)
    for name, sizes in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
        if name in prompt:
            prompt[name], start = prompt[name].clone(), 0
            tokens = prompt[name].unflatten(0, (-1, MERGE**2))
            for frames, rows, cols in (prompt[sizes] // torch.tensor([1, MERGE, MERGE])).tolist():
                end = start + frames * rows * cols
                raster = tokens[start:end].unflatten(0, (frames, rows, cols))
                raster[:, :, cols // 2 :] = raster[:, :, cols // 2 :][:, :, :1].clone()
                start = end
    return prompt


def placeholders(made, part, tokens, frames, generator):
    """Ids of one picture in a prompt."""
    glm = made.config.model_type == "glm4v"
    token = IMAGE if part == "image" or glm else VIDEO
    if part == "image" or made.config.model_type not in STAMPED:
        return [token] * tokens
    ids = []
    for _ in range(frames):
        ids += torch.randint(6, VOCAB, (STAMP,), generator=generator).tolist() + [token] * (tokens // frames)
    return ids


def types(ids):
    """What the processor says of every token: 0 for text, 1 for images, 2 for videos."""
    return (ids == IMAGE) * 1 + (ids == VIDEO) * 2
