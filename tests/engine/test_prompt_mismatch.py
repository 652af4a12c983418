"""Prompts whose placeholders do not match the features: the error names what may be behind it."""

from __future__ import annotations

import pytest
import tiny
import tiny_folders
import torch

import vlmprune

FIELDS = {
    ("llava", "clip"): "patch_size=6, num_additional_image_tokens=1, vision_feature_select_strategy='default'",
    ("llava", "siglip"): "patch_size=6, num_additional_image_tokens=0, vision_feature_select_strategy='full'",
    ("llava_next", "clip"): "patch_size=6, num_additional_image_tokens=1, vision_feature_select_strategy='default'",
    ("llava_onevision", "siglip"): "num_image_tokens=16, vision_feature_select_strategy='full'",
}


@pytest.mark.parametrize(("family", "tower"), FIELDS)
def test_the_processors_fields_are_named(tiny_model, family, tower):
    text = {"text": "qwen2"} if family == "llava_onevision" else {}
    model, processor = tiny_model(family=family, tower=tower, **text), tiny_folders.processor(family, tower)
    picture, name = tiny_folders.noise_picture(24, 24), FIELDS[family, tower].split("=")[0]
    fine = processor(text="<image> what", images=[picture], return_tensors="pt")
    setattr(processor, name, getattr(processor, name) // 2)
    wrong = processor(text="<image> what", images=[picture], return_tensors="pt")
    assert not torch.equal(fine["input_ids"], wrong["input_ids"])
    with torch.no_grad(), vlmprune.patch(model, "random", keep=3) as handle:
        model(**fine)  # the fields that are named are those that work
        assert handle.trace.counts[0]["patches_after"] == 3
        with pytest.raises(ValueError, match=f"prompt 0 has .* For this model it needs {FIELDS[family, tower]}"):
            model(**wrong)


@pytest.mark.parametrize("left", [20, 8, 1])
def test_a_truncated_prompt_is_named(tiny_model, left):
    """Cut off in the middle of the second image, of the first, and before both."""
    model = tiny_model()
    prompt = tiny.prompt(model, [3, "image", 1, "image", 2], [(24, 24)] * 2)
    cut = {
        name: value[:, :left] if name in ("input_ids", "attention_mask") else value for name, value in prompt.items()
    }
    with torch.no_grad(), vlmprune.patch(model, "random", keep=3):
        with pytest.raises(ValueError, match=r"truncation=True with max_length=\.\.\..* raise max_length"):
            model(**cut)
        model(**prompt)


def test_a_placeholder_that_no_prompt_holds_is_named(tiny_model):
    """Config and processor disagree on the token."""
    model = tiny.model()
    prompt = tiny.prompt(model, [3, "image", 2], [(24, 24)])
    model.config.image_token_id = model.model.config.image_token_id = 3
    prompt["input_ids"][prompt["input_ids"] == 3] = 5
    told = r"No prompt holds token 3, the image placeholder .* \(image_token_id\)"
    with torch.no_grad(), vlmprune.patch(model, "random", keep=3), pytest.raises(ValueError, match=told):
        model(**prompt)


@pytest.mark.parametrize("wrong", [lambda mask: mask[:, 1:], lambda mask: mask.repeat(2, 1)])
def test_a_mask_that_is_not_over_these_prompts(tiny_model, wrong):
    model = tiny_model()
    prompt = tiny.prompt(model, [3, "image", 2], [(24, 24)])
    mask = torch.ones_like(prompt["input_ids"])
    with torch.no_grad(), vlmprune.patch(model, "random", keep=3):
        with pytest.raises(ValueError, match=r"attention_mask is \(\d+, \d+\) and input_ids \(1, \d+\)"):
            model(**prompt | {"attention_mask": wrong(mask)})
        model(**prompt | {"attention_mask": mask})
