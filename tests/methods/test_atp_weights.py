"""ATP's weights: what is written is what is read, and what is wrong with a folder is said."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny
import torch
from probes import same
from tiny import modules

import vlmprune
from vlmprune.methods.atp.method import Atp
from vlmprune.methods.atp.modules import AtpConfig, load, save
from vlmprune.methods.atp.training import facts_of


def test_save_and_load(tmp_path, tiny_model):
    model = tiny_model()
    thresholds = modules(model, form="means", strides=(2, 4))
    found = load(save(thresholds, tmp_path / "atp"))
    assert found.config == thresholds.config
    assert not found.training
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), thresholds.parameters(), strict=True))
    prompt = tiny.prompt(model, [4, "image", 5], [(24, 24)])
    with torch.no_grad():
        with vlmprune.patch(model, Atp(thresholds=thresholds)):
            expected = model(**prompt).logits
        with vlmprune.patch(model, Atp(weights=tmp_path / "atp")):
            same(model(**prompt).logits, expected, 0)


def test_a_hub_id(tmp_path, tiny_model, monkeypatch):
    import huggingface_hub

    save(modules(tiny_model()), tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name: str(tmp_path / name))
    assert load("someone/atp-tiny").config.average == 0.9


def test_refusals(tmp_path, tiny_model, monkeypatch):
    import huggingface_hub
    from safetensors.torch import load_file, save_file

    def offline(repo, name):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    model = tiny_model()
    folder = save(modules(model), tmp_path / "atp")
    for options, kind, match in (
        ({}, ValueError, r"needs trained modules.*train_atp\.py"),
        ({"weights": tmp_path / "nowhere"}, FileNotFoundError, r"is no folder.*train_atp\.py"),
        ({"weights": tmp_path}, FileNotFoundError, "has no atp_config"),
        ({"weights": folder, "use": "neither"}, ValueError, "use='neither' is not one of"),
    ):
        with pytest.raises(kind, match=match):
            Atp(**options)
    for word in ("keep", "average"):
        with pytest.raises(ValueError, match=rf"'atp' refuses {word}=0\.5: .*train_atp\.py"):
            vlmprune.patch(model, "atp", weights=folder, **{word: 0.5})
    other = tiny.model(num_hidden_layers=8)
    with pytest.raises(ValueError, match=r"another model: decoder_layers 4 \(this model: 8\)"):
        vlmprune.patch(other, Atp(weights=folder))
    config = json.loads((folder / "atp_config.json").read_text())
    (folder / "atp_config.json").write_text(json.dumps(config | {"hidden": 8}))
    with pytest.raises(ValueError, match=r"cuts\.0\.r\.weight has shape \(1, 16\).*describes \(1, 8\)"):
        load(folder)
    (folder / "atp_config.json").write_text(json.dumps(config | {"form": "best"}))
    with pytest.raises(ValueError, match="form='best' is not one of"):
        load(folder)
    (folder / "atp_config.json").write_text(json.dumps(config))
    state = load_file(folder / "atp.safetensors")
    state.pop("cuts.2.z.bias")
    save_file(state, folder / "atp.safetensors")
    with pytest.raises(ValueError, match=r"cuts\.2\.z\.bias has shape None"):
        load(folder)


def test_layers_scale_and_an_average_that_cannot_be_met(tiny_model):
    facts = facts_of(tiny_model())
    for depth, layers in ((32, (4, 14, 24)), (40, (5, 18, 30)), (24, (3, 10, 18)), (6, (1, 3, 4)), (4, (1, 2, 3))):
        assert AtpConfig.of(replace(facts, decoder_layers=depth), 0.5).layers == layers
    with pytest.raises(ValueError, match=r"a model of 3 layers allows 1\.\.2"):
        AtpConfig.of(replace(facts, decoder_layers=3), 0.5)
    with pytest.raises(ValueError, match="the first 1 of 4 layers see all 16"):
        AtpConfig.of(facts, 4).target(16)
    with pytest.raises(ValueError, match="average=0 keeps nothing"):
        AtpConfig.of(facts, 0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": 2}, "its format is 2, and this version of vlmprune reads format 1"),
        ({"format": None}, "its format is None"),
        ({"color": "red"}, "'color' is none of its entries, which are model, average, layers"),
        ({"lambda_sample": "x"}, "lambda_sample='x' must be a number"),
        ({"lambda_sample": True}, "lambda_sample=True must be a number"),
        ({"layers": [1.5, 2, 3]}, r"layers=\[1\.5, 2, 3\] must be whole numbers"),
        ({"layers": 3}, "layers=3 must be whole numbers"),
        ({"layers": []}, r"layers=\(\) must be ascending"),
        ({"strides": ["2"]}, r"strides=\['2'\] must be whole numbers"),
        ({"hidden": 16.0}, r"hidden=16\.0 must be a whole number"),
        ({"pool": "8"}, "pool='8' must be a whole number"),
        ({"average": "a"}, "average='a' is not a number"),
        ({"model": {"decoder_layers": "4"}}, "must be the facts of a model"),
        ({"model": 4}, "model=4 must be the facts of a model"),
    ],
    ids=str,
)
def test_a_bad_entry_is_named_with_its_file(change, match, tmp_path, tiny_model):
    path = save(modules(tiny_model()), tmp_path) / "atp_config.json"
    given = json.loads(path.read_text())
    assert load(tmp_path)
    path.write_text(json.dumps(given | change))
    with pytest.raises(ValueError, match=rf"atp_config\.json is not a configuration of ATP modules: .*{match}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"{'format': 1}", "Expecting property name"),
        (b"", "Expecting value"),
        (b"\xff\xfe", "utf-8"),
        (b"[1, 2]", "JSON list instead of an object"),
        (b"{}", "its format is None"),
        (b'{"format": 1}', "missing 3 required"),
    ],
    ids=str,
)
def test_a_bad_configuration_is_named_with_its_file(text, match, tmp_path, tiny_model):
    path = save(modules(tiny_model()), tmp_path) / "atp_config.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=rf"atp_config\.json is not a configuration of ATP modules: .*{match}"):
        Atp(weights=tmp_path)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_weights_are_named(size, tmp_path, tiny_model):
    path = save(modules(tiny_model()), tmp_path) / "atp.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"atp\.safetensors is no safetensors file, or not a whole one"):
        load(tmp_path)


@pytest.mark.parametrize("weights", [3, 0.5, True, ["atp"]], ids=str)
def test_weights_are_a_folder_or_an_id(weights):
    with pytest.raises(ValueError, match="must be a folder or a hub id, not "):
        Atp(weights=weights)
