"""What each family tells about a model."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
import tiny_qwen
import torch
from kin import KIN
from kin.byhand import answered

import vlmprune
from vlmprune import registry
from vlmprune.parts import DecoderLayer, TowerLayer
from vlmprune.patches import FAMILIES as EVERY
from vlmprune.patches import family_of, language_models, towers

FAMILIES = [kind for kind in EVERY if kind in tiny.CLASSES]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
def test_facts(family, tower, text):
    model = tiny.shared(family=family, tower=tower, text=text)
    found = family_of(model)
    if (family, tower) == ("vipllava", "siglip"):
        with pytest.raises(vlmprune.UnsupportedError, match=r"first token, .*use a tower with a \[CLS\] token"):
            found.facts(model.model)
        return
    facts = found.facts(model.model)
    assert (found.model_type, facts.family) == (family, family)
    feature = 5 if family == "llava_onevision" else 4
    assert (facts.tower_layers, facts.feature_layer, facts.decoder_layers) == (6, feature, 4)
    assert facts.has_cls == (tower == "clip")
    assert facts.views == (family not in tiny.SINGLE)
    assert found.inner(model) is found.inner(model.model) is model.model
    assert found.side(model.model) == (tiny.SIDE, tiny.SIDE)
    assert len(found.tower_layers(*found.towers(model.model))) == 6
    assert len(found.decoder_layers(model.model)) == 4
    assert [found.token(model.model, m) for m in found.modalities] == [tiny.IMAGE, tiny.VIDEO][: len(found.modalities)]


@pytest.mark.parametrize("family", tiny_qwen.CLASSES)
def test_facts_of_packed_families(family):
    model = tiny.shared(family=family)
    found = family_of(model)
    facts, windows = found.facts(model.model), family == "qwen2_5_vl"
    assert (facts.family, facts.has_cls, facts.views, facts.view_patches) == (family, False, False, 0)
    assert (facts.tower_layers, facts.feature_layer, facts.decoder_layers) == (tiny_qwen.DEPTH, tiny_qwen.DEPTH - 1, 4)
    assert (facts.axes, facts.packed, facts.windowed) == (3, True, (0, 2, 3, 5) if windows else ())
    assert facts.attention_layer == (4 if windows else tiny_qwen.DEPTH - 1)
    assert found.inner(model) is found.inner(model.model) is model.model
    film = tiny.IMAGE if family == "glm4v" else tiny.VIDEO
    assert [found.token(model.model, m) for m in found.modalities] == [tiny.IMAGE, film]
    grid = found.packing(model.model, "image", (1, 6, 10)).trace()
    assert (grid.planes, grid.tokens, grid.views, grid.frames, grid.side) == (((3, 5),), 15, 1, 0, (3, 5))
    grid = found.packing(model.model, "video", (2, 6, 10)).trace()
    assert (grid.planes, grid.tokens, grid.views, grid.frames) == (((3, 5), (3, 5)), 30, 2, 2)
    assert grid.view.tolist() == [0] * 15 + [1] * 15
    assert grid.col.tolist() == [0, 1, 2, 3, 4] * 6


@pytest.mark.parametrize("kin", KIN.values(), ids=KIN)
def test_what_is_said_of_published_models_is_so_of_the_tiny_one(kin):
    found, config = family_of(kin.model()), kin.model().config
    assert found.usual_tower == config.vision_config.model_type, "usual_tower, which `vlmprune ls models` shows"
    assert (found.usual_unit > 1) == (found.unit(kin.model().model) > 1), "usual_unit"
    assert kin.model().model.get_submodule(found.projector) is not None


@pytest.mark.parametrize("kind", [*FAMILIES, *tiny_qwen.CLASSES, *KIN])
def test_usual_facts_say_of_a_family_what_its_model_says(kind):
    """`vlmprune ls models` tells by them what does not run, and serving what it can serve."""
    model = KIN[kind].model() if kind in KIN else tiny.shared(family=kind)
    family = family_of(model)
    usual, real = family.usual(), family.facts(family.inner(model))
    kinds = ("family", "views", "axes", "packed", "sparse", "closed")
    assert {name: getattr(usual, name) for name in kinds} == {name: getattr(real, name) for name in kinds}
    assert (usual.view_patches > 0) != usual.packed
    assert bool(usual.recurrent) == bool(real.recurrent), "usual_attends"
    assert usual.has_cls == towers.TOWERS[family.usual_tower]


@pytest.mark.parametrize("kin", KIN.values(), ids=KIN)
def test_processor_fields_are_words_of_its_processor(kin):
    found, kind = family_of(kin.model()), kin.model().config.model_type
    if (spec := find_spec(f"transformers.models.{kind}.processing_{kind}")) is None:
        pytest.skip("the processor of another family")
    fields = found.processor_fields(kin.model().model)
    told = Path(spec.origin).read_text(encoding="utf-8")
    assert any(field in told for field in fields), f"its processor knows none of processor_fields: {fields}"


@pytest.mark.parametrize(
    ("kinds", "promised"),
    [(towers.LAYERS, TowerLayer), (language_models.LAYERS, DecoderLayer)],
    ids=["tower", "decoder"],
)
def test_every_adapter_answers_all_that_a_tap_may_ask(kinds, promised):
    asked = {name for name in (*vars(promised), *promised.__annotations__) if not name.startswith("_")}
    assert {"scale", "keys"} <= asked
    assert {kind.__name__: lacks for kind in {*kinds.values()} if (lacks := asked - {*dir(kind)})} == {}


def test_a_family_that_does_not_say_that_features_leave_through_a_norm_is_told_so(monkeypatch):
    kin = KIN["deepseek_vl"]
    monkeypatch.setattr(type(family_of(kin.model())), "closed", False)
    told = pytest.raises(vlmprune.UnsupportedError, match=r"no hidden states .*has to say closed = True")
    with told, vlmprune.patch(kin.model(), "scope", keep=0.4):
        answered(kin, kin.scene().inputs)


@pytest.mark.parametrize(("given", "want"), [(-1, 5), (-2, 4), (-6, 0), (3, 2), (6, 5), ([2, -2], 4), ([-3, 1], 3)])
def test_the_feature_layer_is_the_one_whose_output_is_used(given, want):
    model = tiny.model()
    model.config.vision_feature_layer = given
    assert family_of(model).facts(model.model).feature_layer == want


@pytest.mark.parametrize("layers", [-1, -3, 2])
def test_fopru_follows_the_feature_layer(layers):
    model = tiny.model()
    model.config.vision_feature_layer = layers
    (cut,) = registry.find("fopru")(keep=3).cuts(family_of(model).facts(model.model))
    seen = []
    model.model.vision_tower.encoder.layers[cut.see[0].layer].register_forward_hook(lambda m, a, o: seen.append(o))
    pixels = tiny.pixels(model, [(24, 24)])
    with torch.no_grad():
        out = model.model.vision_tower(**pixels, output_hidden_states=True)
    got = seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0]
    assert torch.equal(got, out.hidden_states[layers])


def test_nothing_imports_the_original_package():
    import subprocess
    import sys

    code = "import sys, vlmprune; from vlmprune.patches import FAMILIES; vlmprune.patch; print('llava' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_family_is_small_enough_to_copy():
    import inspect
    from importlib import import_module

    for family in EVERY.keys() - {"llava_llama", "llava_mistral"}:  # a host of its own
        lines = inspect.getsource(import_module(f"vlmprune.patches.{family}")).splitlines()
        most = 80 if family == "qwen2_vl" else 60  # which all its successors share
        assert len(lines) < most, f"patches/{family}.py has {len(lines)} lines"


@pytest.mark.parametrize(
    ("kinds", "kind", "looking", "where"),
    [(language_models.LAYERS, "LlamaDecoderLayer", "fastv", "decoder layers"),
     (towers.LAYERS, "CLIPEncoderLayer", "fopru", "layers of the vision tower")],
    ids=["decoder", "tower"],
)  # fmt: skip
def test_a_layer_of_an_unknown_kind_is_refused_where_a_method_looks_at_it(monkeypatch, kinds, kind, looking, where):
    monkeypatch.delitem(kinds, kind)
    model = tiny.shared()
    prompt = tiny.prompt(model, [2, "image", 3], [(24, 24)])
    with torch.no_grad(), vlmprune.patch(model, "divprune", keep=6) as handle:
        model(**prompt)  # which looks at no layer
        assert len(handle.trace.kept()) == 6
    told = pytest.raises(vlmprune.UnsupportedError, match=f"looks into {where}, and {kind} is not one that is known")
    with told:
        vlmprune.patch(model, looking, keep=6)
    assert not any(module._forward_pre_hooks for module in model.modules())
