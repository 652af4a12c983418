"""Tiny models of the original `llava` package with the weights of a tiny Hugging Face model (its twin, see tiny.py)."""

from __future__ import annotations

import copy
import tempfile
from functools import lru_cache

import pytest
import tiny
import torch
from tiny import CACHE

pytest.importorskip(
    "llava.model.llava_arch", reason="the original llava package is not installed (make install does: llava-torch)"
)

from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
from transformers import CLIPImageProcessorPil, CLIPVisionModel

IMAGE = -200
PARTS, SIZES = [4, "image", 3, "image", 5], [(40, 24), (20, 70)]  # a prompt
GREEDY = {"max_new_tokens": 4, "do_sample": False}
CLASSES = {
    "llama": (LlavaLlamaForCausalLM, LlavaConfig),
    "mistral": (LlavaMistralForCausalLM, LlavaMistralConfig),
}
RENAMED = {
    "model.language_model.": "model.",
    "model.vision_tower.": "model.vision_tower.vision_tower.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
}


def renamed(name):
    """A weight's name in the original model."""
    old = next((prefix for prefix in RENAMED if name.startswith(prefix)), "")
    return RENAMED.get(old, "") + name.removeprefix(old)


def model(twin, load=True, **options):
    """The original model with the weights of `twin`."""
    kind, made_from = CLASSES[twin.config.text_config.model_type]
    text, anyres = twin.config.text_config.to_dict(), twin.config.model_type == "llava_next"
    text = {name: text[name] for name in text if name not in ("model_type", "architectures", "transformers_version")}
    if anyres:
        pinpoints = [[width, height] for height, width in twin.config.image_grid_pinpoints]
        shape = {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres"}
        options = shape | {"image_grid_pinpoints": pinpoints} | options
    with tempfile.TemporaryDirectory() as folder:
        CLIPVisionModel(twin.config.vision_config).save_pretrained(folder)
        CLIPImageProcessorPil(size={"shortest_edge": tiny.TILE}).save_pretrained(folder)
        config = made_from(
            **text, mm_vision_tower=folder, mm_hidden_size=twin.config.vision_config.hidden_size,
            mm_projector_type="mlp2x_gelu", mm_vision_select_layer=twin.config.vision_feature_layer,
            **({"mm_vision_select_feature": "patch", "tokenizer_padding_side": "left"} | options),
        )  # fmt: skip
        config._attn_implementation = twin.config._attn_implementation
        made = kind(config)
        if not load:
            return made
        made.get_vision_tower().load_model()
    made = made.to(twin.dtype).eval()
    weights = {renamed(name): weight for name, weight in twin.state_dict().items()}
    ours = made.state_dict()
    if "model.image_newline" not in ours:
        weights.pop("model.image_newline", None)
    assert weights.keys() == ours.keys()
    made.load_state_dict(weights)
    made.generation_config.eos_token_id = None
    return made


@lru_cache
def pair(family="llava", dtype=torch.float64, side="left", **text):
    """(original, Hugging Face twin), built once a process; leave them as you found them."""
    twin = tiny.shared(family=family, dtype=dtype, **text)
    return model(twin, tokenizer_padding_side=side), twin


def variant(family="llava_next", side="left", **config):
    """A copy of the original with another config."""
    made = copy.deepcopy(pair(family, side=side)[0])
    for name, value in config.items():
        setattr(made.config, name, value)
    return made


def pictures(twin, sizes, seed=0):
    """A twin's pictures as the original wants them: one tensor, or views per image and (width, height)."""
    given = tiny.pixels(twin, sizes, seed)
    if "image_sizes" not in given:
        return {"images": given["pixel_values"]}
    views = [int(image.flatten(1).any(1).sum()) for image in given["pixel_values"]]
    images = [image[:n] for image, n in zip(given["pixel_values"], views, strict=True)]
    return {"images": images, "image_sizes": [(width, height) for height, width in sizes]}


def prompt(twin, parts, sizes, seed=0):
    """`tiny.prompt` for both: the original's inputs, with one placeholder an image, and the twin's."""
    theirs = tiny.prompt(twin, parts, sizes, seed)
    counts, ids, left = iter(tiny.tokens_per_image(twin, sizes, seed) if sizes else []), [], 0
    for token in theirs["input_ids"][0].tolist():
        if token != tiny.IMAGE:
            ids.append(token)
        elif left:
            left -= 1
        else:
            ids.append(IMAGE)
            left = next(counts) - 1
    ours = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    return ours | (pictures(twin, sizes, seed) if sizes else {}), theirs


def batch(prompts, side="left"):
    """Pad prompts of the original into one batch; one without images brings one that nobody reads."""
    spare = {"images": torch.zeros(1, 3, tiny.TILE, tiny.TILE, dtype=torch.float64), "image_sizes": [(9, 9)]}
    prompts = [p if "images" in p else p | spare for p in prompts]
    out = tiny.batch([{name: p[name] for name in ("input_ids", "attention_mask")} for p in prompts], side)
    images = [image for p in prompts for image in p["images"]]
    if all(image.ndim == 3 and "image_sizes" not in p for p in prompts for image in p["images"]):
        return out | {"images": torch.stack(images)}
    return out | {"images": images, "image_sizes": [s for p in prompts for s in p.get("image_sizes", [(9, 9)])]}


def generate(model, inputs, **options):
    """The new tokens alone, as the host returns them; greedily unless `options` say otherwise."""
    given = GREEDY | inputs | options
    hook = model.register_forward_pre_hook(old_name, with_kwargs=True)
    try:
        return model.generate(given.pop("input_ids"), **given)
    finally:
        hook.remove()


def old_name(model, args, kwargs):
    """Since transformers 5.24 `generate` calls the cache as the package does not, so unpatched it cannot run."""
    kwargs = dict(kwargs)
    if "cache" in kwargs:
        kwargs["past_key_values"] = kwargs.pop("cache")
    return args, kwargs


def forced_logits(model, inputs, lengths, forced):
    """`(batch, 1 + steps, vocab)` logits at each prompt's last token and at every forced one of `(batch, steps)`.

    `lengths` are those of the expanded prompts.
    """
    longest, rows = max(lengths), torch.arange(len(lengths))
    real = torch.tensor(lengths)
    left = model.config.tokenizer_padding_side == "left"
    column = torch.arange(longest).expand(len(lengths), -1)
    mask = (column >= longest - real[:, None] if left else column < real[:, None]).long()
    last = torch.full_like(real, longest - 1) if left else real - 1
    # with images any position ids will do: the host makes its own of them, counting real tokens
    positions = torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"])
    out = model(**inputs, position_ids=positions, use_cache=True)
    assert out.logits.shape[1] == longest
    logits, cache = [out.logits[rows, last]], out[CACHE]
    for step in range(forced.shape[1]):
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
        out = model(
            input_ids=forced[:, step : step + 1], attention_mask=mask, position_ids=(real + step)[:, None],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)
