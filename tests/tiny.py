"""Tiny random models built from configs, and inputs for them; nothing is downloaded."""

from __future__ import annotations

import inspect
from functools import lru_cache

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

VIDEO, IMAGE, PAD, VOCAB = 4, 5, 3, 64
TILE, PATCH, SIDE = 24, 6, 4  # pixels of a view, of a patch; patches along a side
LAYERS = 4
# what this release of transformers calls the cache of keys and values, among arguments and outputs
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"

TEXT = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
TOWER = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}


PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE], [3 * TILE, TILE], [TILE, 3 * TILE]]
# enough crops that packing shrinks a canvas (from 11 views' worth of patches on)
ONEVISION = [[TILE * rows, TILE * cols] for rows in range(1, 5) for cols in range(1, 5)]
VIDEOS = ("llava_onevision", "llava_next_video")
SINGLE = ("llava", "vipllava")  # families whose images have one view each, all of one shape
CLASSES = {
    "llava": (LlavaForConditionalGeneration, LlavaConfig),
    "llava_next": (LlavaNextForConditionalGeneration, LlavaNextConfig),
    "llava_onevision": (LlavaOnevisionForConditionalGeneration, LlavaOnevisionConfig),
    "llava_next_video": (LlavaNextVideoForConditionalGeneration, LlavaNextVideoConfig),
    "vipllava": (VipLlavaForConditionalGeneration, VipLlavaConfig),
}


def tiny_qwen():
    """The other file, which imports this one."""
    import tiny_qwen

    return tiny_qwen


def qwen(family):
    """Whether a family, or a model, is one of `tiny_qwen`."""
    return (family if isinstance(family, str) else family.config.model_type) in tiny_qwen().CLASSES


def model(
    family="llava", text="llama", tower="clip", dtype=torch.float32, seed=0, attn="sdpa", tower_layers=6, **text_options
):
    """A random model whose outputs depend strongly on its picture."""
    if qwen(family):
        return tiny_qwen().model(family, dtype, seed, attn, **text_options)
    torch.manual_seed(seed)
    vision = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": tower_layers, "num_attention_heads": 3,
        "image_size": TILE, "patch_size": PATCH,
    }  # fmt: skip
    if tower == "clip":
        vision["projection_dim"] = 16
    else:
        vision["vision_use_head"] = False
    language = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": PAD,
    }  # fmt: skip
    options = {
        "vision_config": TOWER[tower](**vision),
        "text_config": TEXT[text](**(language | text_options)),
        "image_token_index": IMAGE,
        "vision_feature_layer": -1 if family == "llava_onevision" else -2,  # as published
        "vision_feature_select_strategy": "default" if tower == "clip" else "full",
        "attn_implementation": attn,
    }
    if family in SINGLE:
        options["image_seq_length"] = SIDE * SIDE
    else:
        options["image_grid_pinpoints"] = ONEVISION if family == "llava_onevision" else PINPOINTS
    if family in VIDEOS:
        options["video_token_index"] = VIDEO
    if family == "vipllava":
        del options["vision_feature_select_strategy"], options["vision_feature_layer"]
        options["vision_feature_layers"] = [-2, -4, 1]
    kind, config = CLASSES[family]
    made = kind(config(**options))
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.ndim > 1:  # the default init hardly reacts to anything
                weight.mul_(4.0 if "embed" not in name else 12.0)
    made.generation_config.eos_token_id = None
    return made.to(dtype).eval()


SHARED = []


@lru_cache
def shared(**options):
    """`model`, built once a process; what a test leaves on it is taken off (tests/conftest.py)."""
    SHARED.append(model(**options))
    return SHARED[-1]


def modules(made, seed=0, train=False, biases=(-1.2, 1.0), **options):
    """Random ATP modules for a model, with thresholds among the scores that differ between images.

    Higher `biases` keep fewer tokens.
    """
    from vlmprune.methods.atp.modules import AtpConfig, Thresholds
    from vlmprune.methods.atp.training import facts_of

    torch.manual_seed(seed)
    thresholds = Thresholds(AtpConfig.of(facts_of(made), 0.9, **{"pool": 8, "hidden": 16} | options)).to(made.dtype)
    with torch.no_grad():
        for cut in thresholds.cuts:
            cut.r.bias.fill_(biases[0])
            cut.s.bias.fill_(biases[1])
    return thresholds.train(train)


def pixels(made, sizes, seed=0, together=False):
    """Random pixel values and image sizes for images of `sizes` (height, width), as the processor would shape them.

    `together` says that they are the images of one prompt, where the family wants to know.
    """
    if qwen(made):
        return tiny_qwen().pixels(made, sizes, seed)
    generator = torch.Generator().manual_seed(seed)
    if made.config.model_type in SINGLE:
        values = torch.randn(len(sizes), 3, TILE, TILE, generator=generator)
        return {"pixel_values": values.to(made.dtype)}
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    plain = together and len(sizes) > 1 and made.config.model_type == "llava_onevision"
    views = [
        1 if plain else image_size_to_num_patches(list(size), made.config.image_grid_pinpoints, TILE) for size in sizes
    ]
    values = torch.zeros(len(sizes), max(views), 3, TILE, TILE)
    for i, count in enumerate(views):
        values[i, :count] = torch.randn(count, 3, TILE, TILE, generator=generator)
    given = {"pixel_values": values.to(made.dtype), "image_sizes": torch.tensor(sizes)}
    if together and made.config.model_type == "llava_onevision":
        given["batch_num_images"] = torch.tensor([len(sizes)])
    return given


def video_pixels(made, videos, seed=0):
    """Random pixel values for videos with so many frames each (all alike)."""
    if qwen(made):
        return tiny_qwen().video_pixels(made, videos, seed)
    generator = torch.Generator().manual_seed(seed + 50)
    values = torch.randn(len(videos), videos[0], 3, TILE, TILE, generator=generator)
    return {"pixel_values_videos": values.to(made.dtype)}


def tokens_per_image(made, sizes, seed=0, together=False):
    """Visual tokens of each image, asked of the model itself."""
    given = pixels(made, sizes, seed, together)
    with torch.no_grad():
        return [len(f) for f in made.model.get_image_features(**given, return_dict=True).pooler_output]


def tokens_per_video(made, videos, seed=0):
    """Visual tokens of each video, asked of the model itself."""
    given = video_pixels(made, videos, seed)
    with torch.no_grad():
        return [len(f) for f in made.model.get_video_features(**given, return_dict=True).pooler_output]


def prompt(made, parts, sizes, seed=0, videos=(), together=False):
    """Inputs of one prompt.

    `parts` lists ints (that many random text tokens), "image" (the next of `sizes`) and "video" (the next of `videos`,
    their numbers of frames).
    """
    generator = torch.Generator().manual_seed(seed + 100)
    counts = {
        "image": iter(tokens_per_image(made, sizes, seed, together) if sizes else []),
        "video": iter(tokens_per_video(made, videos, seed) if videos else []),
    }
    ids, frames = [], iter(videos)
    for part in parts:
        if part in counts and qwen(made):
            of = next(frames) if part == "video" else 1
            ids += tiny_qwen().placeholders(made, part, next(counts[part]), of, generator)
        elif part in counts:
            ids += [IMAGE if part == "image" else VIDEO] * next(counts[part])
        else:
            ids += torch.randint(6, VOCAB, (part,), generator=generator).tolist()
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    if qwen(made):
        types = tiny_qwen().types(inputs["input_ids"])
        # GLM-4V's videos have the placeholder of pictures
        inputs["mm_token_type_ids"] = 2 * types if videos and made.config.model_type == "glm4v" else types
    inputs |= pixels(made, sizes, seed, together) if sizes else {}
    return inputs | (video_pixels(made, videos, seed) if videos else {})


def filled(types, width, side):
    """The token types of a prompt with those of padding."""
    zeros = torch.zeros(1, width - types.shape[1], dtype=types.dtype)
    return torch.cat((zeros, types) if side == "left" else (types, zeros), 1)


def batch(prompts, side="left"):
    """Pad single prompts into one batch; images are concatenated (their views padded as the processor pads them)."""
    width = max(p["input_ids"].shape[1] for p in prompts)
    ids, mask = [], []
    for p in prompts:
        n = p["input_ids"].shape[1]
        fill = torch.full((1, width - n), PAD)
        parts = (fill, p["input_ids"]) if side == "left" else (p["input_ids"], fill)
        ids.append(torch.cat(parts, 1))
        zeros, ones = torch.zeros(1, width - n, dtype=torch.long), torch.ones(1, n, dtype=torch.long)
        mask.append(torch.cat((zeros, ones) if side == "left" else (ones, zeros), 1))
    out = {"input_ids": torch.cat(ids), "attention_mask": torch.cat(mask)}
    images = [p["pixel_values"] for p in prompts if "pixel_values" in p]
    if images:
        if images[0].ndim == 5:
            most = max(x.shape[1] for x in images)
            images = [torch.cat((x, x.new_zeros(len(x), most - x.shape[1], *x.shape[2:])), 1) for x in images]
            out["image_sizes"] = torch.cat([p["image_sizes"] for p in prompts if "image_sizes" in p])
        out["pixel_values"] = torch.cat(images)
    if "mm_token_type_ids" in prompts[0]:
        out["mm_token_type_ids"] = torch.cat([filled(p["mm_token_type_ids"], width, side) for p in prompts])
    names = ("batch_num_images", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    for name in names:
        if given := [p[name] for p in prompts if name in p]:
            out[name] = torch.cat(given)
    return out
