"""`vlmprune.load`: a model and its processor by name."""

import json

import pytest
import torch

import vlmprune
from vlmprune import embedded


def test_an_embedded_model_is_ready_to_be_patched_and_run():
    model, processor = vlmprune.load("scene-llava", device="cpu")
    assert not model.training
    assert model.dtype == torch.float32
    assert processor.image_processor is not None
    with vlmprune.patch(model, "random", keep=4):
        pass


def test_another_dtype():
    assert vlmprune.load("scene-llava", device="cpu", dtype="bfloat16")[0].dtype == torch.bfloat16


def test_a_path_and_torchs_own_words():
    folder = embedded.path("scene-llava")
    model, _ = vlmprune.load(folder, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"no model '.*/nowhere'"):
        vlmprune.load(folder / "nowhere")


@pytest.mark.parametrize("base", ["itself", "another"])
def test_an_adapter_on_an_adapter_is_refused(base, tmp_path):
    pytest.importorskip("peft")
    for name, on in (("another", "scene-llava"), ("itself", str(tmp_path / base))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": on}))
    with pytest.raises(ValueError, match="which is an adapter itself: merge that one"):
        vlmprune.load(tmp_path / "itself")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("scene-lava", {}, "Did you mean"),
        ("scene-llava", {"device": "tpu"}, "unknown device 'tpu'"),
        ("scene-llava", {"device": 0}, "unknown device '0': cpu, cuda, cuda:N or auto"),
        ("scene-llava", {"dtype": "float8"}, "unknown dtype 'float8'"),
        ("scene-llava", {"dtype": torch.float64}, "unknown dtype torch.float64"),
    ],
)
def test_mistakes_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        vlmprune.load(name, **options)
