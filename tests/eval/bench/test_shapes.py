"""Shapes: real architectures, sizes, refusals. Big ones are only looked at, not filled."""

from __future__ import annotations

import pytest
import torch

from vlmprune.eval.bench import shapes
from vlmprune.eval.bench.workload import make_workload


def hollow(name):
    """The shape's model without memory for its weights."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(shapes.SHAPES[name].config())


def size(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "billions", "patches", "visual"),
    [
        ("llava-1.5-7b", (7.0, 7.1), 576, 576),
        ("llava-next-7b", (7.0, 7.1), 2880, 2928),
        ("llava-onevision-7b", (7.9, 8.1), 3645, 3699),
        ("small", (0.3, 0.4), 576, 576),
        ("small-half", (0.15, 0.2), 576, 576),
        ("small-next", (0.3, 0.4), 2880, 2928),
        ("small-half-next", (0.15, 0.2), 720, 744),
        ("scene-llava", (0.0, 0.01), 256, 256),
        ("qwen2.5-vl-7b", (8.29, 8.30), 576, 576),  # as the checkpoints have
        ("qwen3-vl-8b", (8.76, 8.77), 576, 576),
        ("internvl3.5-8b", (8.52, 8.53), 1280, 1280),
        ("small-qwen2.5-vl", (0.2, 0.3), 576, 576),
        ("small-qwen3-vl", (0.2, 0.3), 576, 576),
        ("small-internvl", (0.2, 0.3), 1280, 1280),
    ],
)
def test_sizes_and_tokens(name, billions, patches, visual):
    model = hollow(name)
    assert billions[0] <= size(model) / 1e9 <= billions[1]
    made = make_workload(model, 1, 60)
    assert (made.patches, made.visual, made.length) == (patches, visual, visual + 60)
    crops = ("next", "next-7b", "onevision-7b", "internvl", "internvl3.5-8b")
    assert made.views == (5 if name.endswith(crops) else 1)


def test_the_small_language_model_dominates():
    model = hollow("small").model
    assert size(model.language_model) >= 0.3e9
    assert size(model.vision_tower) < 0.05 * size(model.language_model)


def test_building_is_repeatable_and_of_the_dtype():
    one, other = (shapes.build(shapes.find_shape("scene-llava"), dtype=torch.bfloat16) for _ in range(2))
    assert one.dtype == torch.bfloat16
    assert not one.training
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.device.type == "cpu"


def test_what_does_not_fit_is_refused_before_it_is_built(monkeypatch):
    monkeypatch.setattr(shapes, "free_memory", lambda device: 10 * 2**30)
    with pytest.raises(MemoryError, match=r"7\.06 B parameters: 26\.3 GiB in float32, and cpu has 10\.0 GiB free"):
        shapes.build(shapes.find_shape("llava-1.5-7b"))


def test_unknown_shapes():
    with pytest.raises(ValueError, match=r"unknown shape 'smal'.* 'small'"):
        shapes.find_shape("smal")


def test_onevision_is_the_real_architecture():
    model = hollow("llava-onevision-7b")
    assert 7.9e9 < size(model) < 8.1e9
    assert model.config.text_config.num_key_value_heads == 4


def test_a_workload_has_one_picture_per_row_and_no_stray_placeholder(work):
    here = work(3, family="llava_next")
    ids = here.inputs["input_ids"]
    assert ids.shape == (3, here.length)
    assert (ids == 5).sum(1).tolist() == [here.visual] * 3
    assert (ids[:, here.start : here.start + here.visual] == 5).all()
    assert not torch.equal(ids[0], ids[1])
    assert torch.equal(ids, work(3, family="llava_next").inputs["input_ids"])
