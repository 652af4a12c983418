"""Saving and copying a patched model: files are the plain model's, copies and pickles are patched models alone."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import textwrap

import pytest
import scenes
import tiny
import torch
from clocks import PATIENCE
from leftovers import ours
from safetensors.torch import load_file

import vlmprune

F64 = torch.float64


@pytest.mark.parametrize("name", scenes.CUTTERS)
def test_save_pretrained_saves_the_plain_model(family_scene, name, support, tmp_path):
    scene = family_scene
    model, prompt = scene.model, scene.prompt()
    support("save_pretrained", scene, name)
    model.save_pretrained(tmp_path / "plain")  # which writes into the config
    config = model.config.to_dict()
    with torch.no_grad(), scenes.start(scene, name):
        model(**prompt)
        model.save_pretrained(tmp_path / "patched")
        assert model.config.to_dict() == config
    names = sorted(file.name for file in (tmp_path / "plain").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "patched").iterdir())
    for file in names:
        one, other = (tmp_path / kind / file for kind in ("plain", "patched"))
        if file.endswith(".json"):
            assert json.loads(one.read_text()) == json.loads(other.read_text()), file
        else:
            weights, again = load_file(one), load_file(other)
            assert weights.keys() == again.keys()
            assert all(torch.equal(weights[key], again[key]) for key in weights)
    folders = (tmp_path / "plain", tmp_path / "patched")
    first, second = (type(model).from_pretrained(folder, dtype=F64).eval() for folder in folders)
    assert not ours(second)
    with torch.no_grad():
        assert torch.equal(second(**prompt).logits, first(**prompt).logits)


@pytest.mark.parametrize("name", scenes.CUTTERS)
def test_deepcopy(family_scene, name, support):
    """A copy prunes with its own weights, writes its own trace and unpatches alone."""
    scene = family_scene
    model, prompt = scene.model, scene.prompt()
    support("deepcopy and pickle", scene, name)
    with torch.no_grad():
        plain = model(**prompt).logits
        with scenes.start(scene, name) as handle:
            pruned, trace = model(**prompt).logits, handle.trace
            twin = copy.deepcopy(model)
            assert len(ours(twin)) == len(ours(model)) > 0
            assert torch.equal(twin(**prompt).logits, pruned)
            assert handle.trace is trace
            for weight in twin.parameters():
                weight.zero_()
            assert torch.equal(model(**prompt).logits, pruned)
            assert not torch.equal(twin(**prompt).logits, pruned)
            assert not ours(vlmprune.unpatch(twin))
            assert torch.equal(model(**prompt).logits, pruned)
        assert torch.equal(model(**prompt).logits, plain)


READER = """
import sys
import torch
import vlmprune
from transformers import PreTrainedModel
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY
from vlmprune.engine.install import is_hook

torch.set_num_threads(1)


def register(model):
    # transformers notes what can be recorded of a model when it is built, and forgets it when it is unpickled
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            key = str(module.__class__) if type(_CAN_RECORD_REGISTRY) is dict else module
            _CAN_RECORD_REGISTRY[key] = module._can_record_outputs


for case in torch.load(sys.argv[1], weights_only=False):
    model, prompt = case["model"], case["prompt"]
    register(model)
    with torch.no_grad():
        assert torch.equal(model(**prompt).logits, case["pruned"]), case["name"]
        vlmprune.unpatch(model)
        left = [h for m in model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
        assert not any(map(is_hook, left)), case["name"]
        assert torch.equal(model(**prompt).logits, case["plain"]), case["name"]
        vlmprune.patch(model, "random", keep=0.4)
        assert not torch.equal(model(**prompt).logits, case["plain"]), case["name"]
print(len(torch.load(sys.argv[1], weights_only=False)), "read")
"""


def test_pickles_in_another_process(support, tmp_path):
    """`torch.save` of whole patched models; the process that reads them knows nothing but the file."""
    cases = []
    for kind, method in zip(scenes.FAMILIES, scenes.CUTTERS * len(scenes.FAMILIES), strict=False):
        scene = scenes.Scene(*scenes.FAMILIES[kind])
        method = "fopru" if scene.refusal(method) else method
        support("deepcopy and pickle", scene, method)
        # transformers' own hooks, which come with the first forward pass, do not pickle: take one that has not run
        model, prompt = tiny.model(dtype=F64, **scene.options), scene.prompt()
        with torch.no_grad():
            plain = scene.model(**prompt).logits
            with vlmprune.patch(scene.model, method, **scenes.options(scene.model, method)):
                pruned = scene.model(**prompt).logits
        vlmprune.patch(model, method, **scenes.options(model, method))
        name = f"{kind} {method}"
        cases.append({"name": name, "model": model, "prompt": prompt, "plain": plain, "pruned": pruned})
    torch.save(cases, tmp_path / "models.pt")
    run(tmp_path / "models.pt", len(cases))


def run(file, cases):
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(READER), str(file)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{cases} read" in done.stdout


@pytest.mark.parametrize("name", ["fopru", "fastv", "tome"])
def test_copies_of_the_original_llava(name, support):
    original = pytest.importorskip("original", reason="the original llava package is not installed (make install does)")
    model, twin = original.pair()
    support("deepcopy and pickle", model, name)
    inputs, _ = original.prompt(twin, [4, "image", 6], [(24, 24)])
    with torch.no_grad():
        plain = model(**inputs).logits
        with vlmprune.patch(model, name, keep=0.4) as handle:
            pruned, trace = model(**inputs).logits, handle.trace
            copied = copy.deepcopy(model)
            assert torch.equal(copied(**inputs).logits, pruned)
            assert handle.trace is trace
            assert not ours(vlmprune.unpatch(copied))
            assert torch.equal(copied(**inputs).logits, plain)
            assert torch.equal(model(**inputs).logits, pruned)
    assert not torch.equal(pruned, plain)
