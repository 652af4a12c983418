"""`vlmprune.load`: a model and its processor by name."""

import pytest
import torch

import vlmprune


def test_an_embedded_model_is_ready_to_be_patched_and_run():
    model, processor = vlmprune.load("scene-llava", device="cpu")
    assert not model.training
    assert model.dtype == torch.float32
    assert processor.image_processor is not None
    with vlmprune.patch(model, "random", keep=4):
        pass


def test_another_dtype():
    assert vlmprune.load("scene-llava", device="cpu", dtype="bfloat16")[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("scene-lava", {}, "Did you mean"),
        ("scene-llava", {"device": "tpu"}, "unknown device 'tpu'"),
        ("scene-llava", {"dtype": "float8"}, "unknown dtype 'float8'"),
    ],
)
def test_mistakes_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        vlmprune.load(name, **options)
