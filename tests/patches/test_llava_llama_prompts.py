"""Prompts of the original llava package: pictures are packed and placeholders expanded as the host does it."""

from __future__ import annotations

from contextlib import nullcontext

import original
import pytest
import tiny
import torch
from original import PARTS, SIZES

import vlmprune
from vlmprune import UnsupportedError
from vlmprune.patches import family_of
from vlmprune.patches.tagged import Tagged


@pytest.mark.parametrize("size", [(40, 24), (24, 40), (20, 70), (70, 20), (24, 24), (100, 90), (1, 60), (37, 53)])
def test_layouts_are_those_of_the_twin(size):
    model, twin = original.pair("llava_next")
    height, width = size
    views, _ = family_of(twin).grid(twin.model, size)
    got = family_of(model).image_grid(model.model, (True, views, (width, height)))
    want = family_of(twin).image_grid(twin.model, size)
    for name, value in vars(want).items():
        mine = getattr(got, name)
        assert torch.equal(mine, value) if isinstance(value, torch.Tensor) else mine == value, name


@pytest.mark.parametrize(
    ("config", "pictures", "tokens", "newlines"),
    [
        ({}, lambda x: x[0][:1], 16, 0),  # a plain batch of pictures is not packed
        ({}, lambda x: [x[0][0]], 17, 1),  # a list of single views is
        ({}, lambda x: x[0][None], 16 + 32 + 8, 8),
        ({"mm_patch_merge_type": "spatial"}, lambda x: x, 16 + 32, 0),
        ({"mm_patch_merge_type": "flat"}, lambda x: [x[0][0]], 16, 0),
        ({"image_grid_pinpoints": "[[24, 48]]"}, lambda x: x, 16 + 32 + 8, 8),
    ],
)
@torch.no_grad()
def test_every_packing_of_the_host_is_traced(config, pictures, tokens, newlines):
    model = original.variant(**config)
    _, twin = original.pair("llava_next")
    inputs, _ = original.prompt(twin, [3, "image", 4], [(48, 24)])
    inputs["images"] = pictures(inputs["images"])
    handle = vlmprune.patch(model, "vtc_cls", keep=8)
    assert model(**inputs).logits.shape[1] == 7 + tokens
    (grid,) = handle.trace.grids
    assert (grid.tokens, grid.newlines) == (tokens, newlines)
    assert handle.trace.kv_lengths == [7 + 8 + newlines] * tiny.LAYERS


@torch.no_grad()
def test_flat_views_of_one_picture_are_refused():
    model = original.variant(mm_patch_merge_type="flat")
    inputs, _ = original.prompt(original.pair("llava_next")[1], [3, "image", 4], [(48, 24)])
    vlmprune.patch(model, "vtc_cls", keep=8)
    with pytest.raises(UnsupportedError, match="'flat' with 3 views of one image"):
        model(**inputs)


@pytest.mark.parametrize("given", [(), ("mask",), ("mask", "positions", "labels"), ("labels",)])
@torch.no_grad()
def test_prompts_are_expanded_as_the_host_expands_them(pair, given):
    model, twin = pair
    inputs = original.batch([original.prompt(twin, *p)[0] for p in ((PARTS, SIZES), ([7, "image"], SIZES[:1]))])
    inputs["input_ids"][1, 0] = original.IMAGE  # in the padding: no image unless there is no mask
    if "mask" not in given:
        inputs["images"] = [*inputs["images"], inputs["images"][0]]
        inputs["image_sizes"] = [*inputs.get("image_sizes", SIZES), SIZES[0][::-1]]
    kwargs = {
        "input_ids": inputs["input_ids"],
        "position_ids": torch.zeros_like(inputs["input_ids"]) if "positions" in given else None,
        "attention_mask": inputs["attention_mask"] if "mask" in given else None,
        "past_key_values": None,
        "labels": inputs["input_ids"] + 1 if "labels" in given else None,
        "images": inputs["images"],
        "image_sizes": inputs.get("image_sizes"),
    }
    want = model.prepare_inputs_labels_for_multimodal(**kwargs)
    plain = model(**{k: v for k, v in kwargs.items() if k != "labels"}).logits
    handle = vlmprune.patch(model, "random", keep=1.0)
    for mine, theirs in zip(model.prepare_inputs_labels_for_multimodal(**kwargs), want, strict=True):
        assert mine is theirs is None or (torch.equal(mine, theirs) and mine.dtype == theirs.dtype)
    assert torch.equal(model(**{k: v for k, v in kwargs.items() if k != "labels"}).logits, plain)
    assert handle.trace.sample == ([0, 0, 1] if "mask" in given else [0, 0, 1, 1])


@torch.no_grad()
def test_a_prompt_cut_off_in_a_picture_is_refused():
    model = original.variant("llava", side="right", tokenizer_model_max_length=14)
    inputs, _ = original.prompt(original.pair()[1], [4, "image", 5], [(24, 24)])
    assert model(**inputs).logits.shape[1] == 14
    vlmprune.patch(model, "random", keep=4)
    with pytest.raises(ValueError, match="prompt 0 has 10 image placeholders and its images have 16 tokens"):
        model(**inputs)


@torch.no_grad()
def test_prepared_embeddings_carry_their_layout(pair):
    model, twin = pair
    ours, _ = original.prompt(twin, PARTS, SIZES)
    handle = vlmprune.patch(model, "vtc_cls", keep=4)
    want = model(**ours).logits
    _, _, mask, _, embeds, _ = model.prepare_inputs_labels_for_multimodal(
        ours["input_ids"], None, ours["attention_mask"], None, None, ours["images"], ours.get("image_sizes")
    )
    handle._plan.trace = None
    assert torch.equal(model(inputs_embeds=embeds.clone(), attention_mask=mask).logits, want)
    assert handle.trace is not None


@pytest.mark.parametrize("disabled", [False, True])
@torch.no_grad()
def test_no_part_of_the_model_computes_with_tagged_tensors(pair, disabled):
    model, twin = pair
    ours, _ = original.prompt(twin, PARTS, SIZES)
    handle, ran, hooks = vlmprune.patch(model, "vtc_cls", keep=4), [], []

    def check(module, args, kwargs, output):
        ran.append(module)
        assert not any(isinstance(x, Tagged) for x in (*args, *kwargs.values(), output))

    for name, module in model.named_modules():
        if name not in ("", "model", "model.vision_tower", "model.vision_tower.vision_tower"):
            hooks.append(module.register_forward_hook(check, with_kwargs=True))
    try:
        with handle.disabled() if disabled else nullcontext():
            model(**ours)
            original.generate(model, ours)
    finally:
        for hook in hooks:
            hook.remove()
    assert {type(module).__name__ for module in ran} >= {"CLIPEncoderLayer", "LlamaDecoderLayer", "Linear"}
