"""Weights elsewhere or smaller: accelerate's offloading, quantised weights, replicas."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import accelerate
import probes
import pytest
import reference
import scenes
import tiny
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from transformers import BitsAndBytesConfig

import vlmprune
from vlmprune import UnsupportedError

F64 = torch.float64


def offload(model, how, folder):
    """Let accelerate keep weights in main memory or on the disk; the model computes on the CPU."""
    if how == "cpu":
        return accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    if how == "whole layers":
        kinds = ["CLIPEncoderLayer", "LlamaDecoderLayer"]
        return accelerate.cpu_offload(model, execution_device="cpu", preload_module_classes=kinds)
    return accelerate.dispatch_model(model, device_map(model), main_device="cpu", offload_dir=folder, force_hooks=True)


def device_map(model):
    """One layer of the tower and of the language model, and the projector, on the disk."""
    inner, disk = model.model, ("vision_tower.encoder.layers.1", "language_model.layers.1", "multi_modal_projector")
    blocks = [n for n, m in inner.named_modules() if n and ("layers." not in n or n.split(".")[-2] == "layers")]
    parts = {"language_model", "vision_tower", "vision_tower.encoder"}
    parts |= {n for n in blocks if n.endswith(".layers")}
    leaves = [n for n in blocks if n not in parts and not any(n.startswith(f"{b}.") for b in blocks if b not in parts)]
    leaves += [n for part in ("", "vision_tower") for n in own(inner.get_submodule(part), part)]
    return {"lm_head": "cpu"} | {f"model.{n}": "disk" if n in disk else "cpu" for n in leaves}


def own(module, name):
    """A module's parameters that are in none of its children."""
    return [f"{name}.{n}".lstrip(".") for n, _ in module.named_parameters(recurse=False)]


def hooked(model):
    return [name for name, module in model.named_modules() if hasattr(module, "_hf_hook")]


@pytest.mark.parametrize("order", ["patched first", "offloaded first"])
@pytest.mark.parametrize("name", scenes.CUTTERS)
def test_offloaded_weights(family_scene, name, order, support, tmp_path):
    scene = family_scene
    support("device_map, disk offload", scene, name)
    prompt, given = scene.prompt(), scenes.options(scene.model, name)
    how = "disk" if (name, order) in (("fopru", "offloaded first"), ("todre", "patched first")) else "cpu"
    with scenes.start(scene, name) as handle, torch.no_grad():
        want, kept = scene.model(**prompt).logits, handle.trace.kept()
    with torch.no_grad():
        plain = scene.model(**prompt).logits
        model = copy.deepcopy(scene.model)
        if order == "patched first":
            handle = vlmprune.patch(model, name, **given)
        offload(model, how, tmp_path)
        if order == "offloaded first":
            handle = vlmprune.patch(model, name, **given)
        assert any(weight.device.type == "meta" for weight in model.parameters())
        assert torch.equal(model(**prompt).logits, want)
        assert handle.trace.kept() == kept
        before = hooked(model)
        vlmprune.unpatch(model)
        assert before == hooked(model) != []
        assert torch.equal(model(**prompt).logits, plain)
        probes.far(want, plain)


@pytest.mark.parametrize("name", ["fopru", "fastv"])
def test_weights_loaded_a_layer_at_a_time(name, support, tmp_path):
    """Taps run before the layer does, so they have to have it loaded."""
    model = tiny.model(dtype=F64)
    support("device_map, disk offload", model, name)
    prompt = tiny.prompt(model, [4, "image", 6], [(24, 24)])
    with torch.no_grad():
        with vlmprune.patch(model, name, keep=0.3):
            want = model(**prompt).logits
        offload(model, "whole layers", tmp_path)
        with vlmprune.patch(model, name, keep=0.3):
            assert torch.equal(model(**prompt).logits, want)
            assert all(weight.device.type == "meta" for weight in model.model.language_model.layers.parameters())


@pytest.mark.parametrize("name", ["fopru", "fastv"])
def test_a_model_loaded_with_a_device_map(name, support, tmp_path):
    """As `from_pretrained` does it, and `generate` on it."""
    made = tiny.model("llava_next")
    support("device_map, disk offload", made, name)
    prompt = tiny.prompt(made, [4, "image", 6], [(40, 24)])
    made.save_pretrained(tmp_path / "model")
    given = {"device_map": device_map(made), "offload_folder": tmp_path / "weights"}
    model = type(made).from_pretrained(tmp_path / "model", **given)
    assert model.model.language_model.layers[1].mlp.up_proj.weight.device.type == "meta"
    asked = {"max_new_tokens": 4, "do_sample": False}
    with vlmprune.patch(made, name, keep=0.3), torch.no_grad():
        want, tokens = made(**prompt).logits, made.generate(**prompt, **asked)
    with vlmprune.patch(model, name, keep=0.3), torch.no_grad():
        assert torch.equal(model(**prompt).logits, want)
        assert torch.equal(model.generate(**prompt, **asked), tokens)


@pytest.mark.parametrize("name", ["fopru", "fastv"])
@torch.no_grad()
def test_layers_get_none_of_our_arguments(name):
    """Disabled or not, on a dispatched model as on any: what our hooks hand on ends with them."""
    model, seen = tiny.model(), []
    prompt = tiny.prompt(model, [4, "image", 6], [(24, 24)])
    accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    handle = vlmprune.patch(model, name, keep=0.3)
    for layer in model.model.language_model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(list(kwargs)), with_kwargs=True
        )
    for options in ({}, {"prompt_lookup_num_tokens": 3}):
        for disabled in (False, True):
            with handle.disabled() if disabled else nullcontext():
                model.generate(**prompt, max_new_tokens=3, do_sample=False, **options)
    assert len(seen) >= 8 * tiny.LAYERS
    assert not [key for keys in seen for key in keys if key.startswith("vlmprune")]


@pytest.mark.parametrize("where", ["tower", "language model"])
def test_layers_spread_over_several_devices(where, support):
    model = tiny.model()
    support("layers over several GPUs", model, "fopru", refused="layers must run on one device")
    inner = model.model
    layers = inner.vision_tower.encoder.layers if where == "tower" else inner.language_model.layers
    # the only second device there is without any hardware
    add_hook_to_module(layers[2], AlignDevicesHook(execution_device="meta"))
    with vlmprune.patch(model, "fopru", keep=0.3), pytest.raises(UnsupportedError, match=r"cpu, then meta.*'disk'"):
        model(**tiny.prompt(model, [4, "image", 6], [(24, 24)]))


# Quantised weights


SIZES = {"hidden_size": 64, "intermediate_size": 64}  # that the 4-bit kernel of CPUs takes; no tiny tower has such
KINDS = {
    "8-bit": ("Linear8bitLt", {"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]}),
    "4-bit": (
        "Linear4bit",
        {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": torch.float32,
            "llm_int8_skip_modules": ["lm_head", "model.vision_tower", "model.multi_modal_projector"],
        },
    ),
}
TOLERANCE = 5e-3  # of the largest logit: weights and, for 8 bits, inputs are rounded to few steps


def quantised(scene, bits, folder):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (make install does)")
    plain = tiny.model(**scene.options, **(SIZES if bits == "4-bit" else {}))
    plain.save_pretrained(folder)
    kind, options = KINDS[bits]
    made = type(plain).from_pretrained(folder, quantization_config=BitsAndBytesConfig(**options), device_map="cpu")
    read = [m for n, m in made.model.language_model.named_modules() if n.endswith((".q_proj", ".k_proj"))]
    assert {type(module).__name__ for module in read} == {kind}
    return made.eval()


@pytest.mark.parametrize(
    ("kind", "bits"),
    [(kind, "8-bit") for kind in ("llava", "next", "vip", "onevision", "next-video-video")] + [("llava", "4-bit")],
)
def test_quantised_weights(kind, bits, support, tmp_path):
    """Pruned is the quantised model's own layers on what was kept; taps see what its projections compute."""
    scene = scenes.Scene(*scenes.FAMILIES[kind])
    model = quantised(scene, bits, tmp_path)
    prompt = {name: x.float() if x.is_floating_point() else x for name, x in scene.prompt().items()}
    for name in scenes.CUTTERS:
        support("8-bit or 4-bit weights", scene, name)
        if scene.refusal(name):
            continue
        with vlmprune.patch(model, name, **scenes.options(model, name)) as handle, torch.no_grad():
            got = scenes.with_cache(model, prompt)[:, 0]
            features = reference.image_features(model, prompt), reference.video_features(model, prompt)
            want, cut = scenes.replay(model, prompt, features, handle.trace)
            assert cut
            top = want.abs().max().item()
            probes.same(got, want, TOLERANCE * top)
            if handle.trace.cuts[-1].merge is None:
                wrong, _ = scenes.replay(model, prompt, features, handle.trace, wrong=True)
                assert probes.gap(got, wrong) > max(2 * probes.gap(got, want), 1e-3 * top)


# Replicas and casts


def replica(module):
    """As DataParallel makes one for another device: instances that share the original's hooks and attributes."""
    made = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        setattr(made, name, None if child is None else replica(child))
    for name, weight in module._parameters.items():
        setattr(made, name, None if weight is None else weight.detach().clone())
    for name, value in module._buffers.items():
        made._buffers[name] = value
    return made


@pytest.mark.parametrize("kind", ["llava", "next", "vip", "onevision"])
def test_data_parallel(kind, support):
    """On no GPU it is the model itself; a replica must use its own weights, bound attributes or not."""
    scene = scenes.Scene(*scenes.FAMILIES[kind])
    model, prompt = copy.deepcopy(scene.model), scene.prompt()
    support("DataParallel", scene, "fopru")
    with vlmprune.patch(model, "fopru", keep=0.4), torch.no_grad():
        want = model(**prompt).logits
        assert torch.equal(nn.DataParallel(model)(**prompt).logits, want)
        twin = replica(model)
        for weight in model.parameters():
            weight.zero_()
        assert torch.equal(twin(**prompt).logits, want)
    with pytest.raises(TypeError, match="DataParallel"):
        vlmprune.patch(nn.DataParallel(model), "fopru", keep=0.4)


@pytest.mark.parametrize("name", scenes.CUTTERS)
def test_another_dtype_after_patching(family_scene, name):
    scene = family_scene
    prompt, given = scene.prompt(), scenes.options(scene.model, name)
    if scene.refusal(name):
        pytest.skip("refused whatever the dtype")
    late, early = copy.deepcopy(scene.model), copy.deepcopy(scene.model).to(torch.bfloat16)
    prompt = {k: v.bfloat16() if v.is_floating_point() else v for k, v in prompt.items()}
    vlmprune.patch(early, name, **given)
    vlmprune.patch(late, name, **given)
    late.to(torch.bfloat16)
    with torch.no_grad():
        want = early(**prompt).logits
        assert want.dtype == torch.bfloat16
        assert torch.equal(late(**prompt).logits, want)
