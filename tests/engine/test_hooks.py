"""What patching leaves behind: nothing."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap

import probes
import pytest
import reference
import tiny
import torch
from clocks import PATIENCE
from leftovers import assert_clean, hooks_on, ours
from probes import far, same
from reference import Rule
from torch import nn

import vlmprune

F64 = torch.float64
METHODS = ["fopru", "vtc_cls", "fastv", "random", "grid", "pool"]


def state(model):
    """Everything of an instance that a patch could have touched; transformers' own lazy hooks apart."""
    return {
        (name, key): (type(value).__name__ if not isinstance(value, dict | list) else len(value))
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in ("_forward_hooks", "_forward_pre_hooks") and not key.startswith("_is_hooked")
        and not key.startswith("_output_capturing")
    }  # fmt: skip


def prompt_of(model):
    return tiny.prompt(model, [4, "image", 6], [(40, 24)])


def logits(model, prompt):
    with torch.no_grad():
        return model(**prompt).logits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_unpatching_leaves_the_model_it_was(family, method):
    model = tiny.model(family)
    prompt = prompt_of(model)
    plain, tokens = logits(model, prompt), model.generate(**prompt, max_new_tokens=4, do_sample=False)
    before, count = state(model), len(hooks_on(model))
    vlmprune.patch(model, method, keep=0.3)
    assert ours(model)
    far(logits(model, prompt), plain)
    model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert vlmprune.unpatch(model) is model
    assert_clean(model)
    assert (state(model), len(hooks_on(model))) == (before, count)
    assert torch.equal(logits(model, prompt), plain)
    assert torch.equal(model.generate(**prompt, max_new_tokens=4, do_sample=False), tokens)
    vlmprune.unpatch(model)  # harmless
    assert torch.equal(logits(model, prompt), plain)


class Raising:
    """A logits processor and streamer that fails at its second use."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.put(None)
        return scores

    def put(self, value):
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("the user's own mistake")

    def end(self):
        pass


@pytest.mark.parametrize("where", ["logits_processor", "streamer", "layer"])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_leaving_the_with_after_an_exception_inside_generate(tiny_model, family, where):
    model = tiny_model(family=family)
    prompt = prompt_of(model)
    plain = logits(model, prompt)
    arguments, broken = {}, None
    if where == "logits_processor":
        arguments = {"logits_processor": [Raising()]}
    elif where == "streamer":
        arguments = {"streamer": Raising()}

    def fail(module, args):
        raise RuntimeError("the user's own mistake")

    with pytest.raises(RuntimeError, match="own mistake"):  # noqa: PT012, SIM117
        with vlmprune.patch(model, "vtc_cls", keep=0.3):
            if where == "layer":
                broken = model.model.language_model.layers[2].mlp.register_forward_pre_hook(fail)
            try:
                model.generate(**prompt, max_new_tokens=6, do_sample=False, **arguments)
            finally:
                if broken is not None:
                    broken.remove()
    assert_clean(model)
    assert torch.equal(logits(model, prompt), plain)


@pytest.mark.parametrize("name", ["fastv", "transprune", "vtc_cls", "tome"])
def test_a_call_that_failed_half_way_leaves_no_trace_in_the_next(tiny_model, name):
    """Out of memory in a layer is caught by servers, which go on with the same patched model in the same thread."""
    model = tiny_model(dtype=F64)
    prompt, text = prompt_of(model), tiny.prompt(model, [5], [])
    plain_text = logits(model, text)

    def fail(module, *args):
        raise RuntimeError("out of memory")

    with vlmprune.patch(model, name, keep=0.3):
        want = logits(model, prompt)
        layers = model.model.vision_tower.encoder.layers
        parts = [m for layer in layers for m in (layer.self_attn.q_proj, layer.mlp.fc1)]
        layers = model.model.language_model.layers
        parts += [m for layer in layers for m in (layer.self_attn.o_proj, layer.mlp.up_proj, layer.input_layernorm)]
        for part in parts:
            hook = part.register_forward_pre_hook(fail)
            try:
                logits(model, prompt)
            except RuntimeError as error:
                assert "out of memory" in str(error)  # noqa: PT017
            hook.remove()
            assert torch.equal(logits(model, text), plain_text)
            assert torch.equal(logits(model, prompt), want)


def test_patching_again_replaces(tiny_model):
    model = tiny_model(dtype=F64)
    prompt, rules = prompt_of(model), [[Rule(0)], [Rule(2, 2)]]
    vlmprune.patch(model, "vtc_cls", keep=3)
    counts = []
    for r in rules:
        handle = vlmprune.patch(model, probes.rules(*r))
        with torch.no_grad():
            same(
                logits(model, prompt)[0, -1], reference.run(vlmprune.unpatch(copy.deepcopy(model)), prompt, r).logits[0]
            )
        assert len(handle.trace.cuts) == 1
        counts.append(len(ours(model)))
    assert counts[0] == counts[1]
    vlmprune.unpatch(model)
    assert_clean(model)


class Adapter(nn.Module):
    """Stands for a PEFT model: it runs the base model and hands it out."""

    def __init__(self, base):
        super().__init__()
        self.base_model = base

    def get_base_model(self):
        return self.base_model

    def forward(self, **kwargs):
        return self.base_model(**kwargs)


def test_an_adapter_around_the_model(tiny_model):
    model = tiny_model()
    prompt, adapter = prompt_of(model), Adapter(model)
    plain = logits(adapter, prompt)
    with vlmprune.patch(adapter, "vtc_cls", keep=0.3) as handle:
        assert handle.model is model
        far(logits(adapter, prompt), plain)
    assert_clean(adapter)
    vlmprune.patch(adapter, "vtc_cls", keep=0.3)
    assert vlmprune.unpatch(adapter) is adapter
    assert_clean(adapter)
    assert torch.equal(logits(adapter, prompt), plain)


def test_patching_touches_no_class_and_no_environment():
    code = """
    import os, sys
    import torch, tiny
    from transformers.models.llava import modeling_llava
    from transformers.models.llava_next import modeling_llava_next
    from transformers.models.llama import modeling_llama
    from transformers.models.clip import modeling_clip
    from transformers import cache_utils, masking_utils
    modules = [modeling_llava, modeling_llava_next, modeling_llama, modeling_clip, cache_utils, masking_utils]
    modules += [torch.nn.Module]
    def picture():
        out = {}
        for m in modules:
            for k, v in vars(m).items():
                out[m.__name__, k] = id(v)
                if isinstance(v, type):
                    inside = [a for a in vars(v) if not a.startswith(("_abc", "__"))]
                    out |= {(m.__name__, k, a): id(vars(v)[a]) for a in inside}
        return out
    model = tiny.model(family="llava_next")
    prompt = tiny.prompt(model, [4, "image", 6], [(40, 24)])
    model.generate(**prompt, max_new_tokens=2, do_sample=False)
    before, env = picture(), dict(os.environ)
    import vlmprune
    for method in ("fopru", "vtc_cls", "fastv", "pool"):
        vlmprune.patch(model, method, keep=0.3)
        model.generate(**prompt, max_new_tokens=2, do_sample=False)
        changed = [k for k, v in picture().items() if before.get(k) != v]
        assert not changed, changed
        assert env == dict(os.environ)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=PATIENCE,
        env={"PYTHONPATH": str(tiny.__file__.rsplit("/", 1)[0]), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
