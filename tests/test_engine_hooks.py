"""What patching leaves behind: nothing."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import textwrap

import probes
import pytest
import reference
import tiny
import torch
from probes import far, same
from reference import Rule
from torch import nn

import vlmprune
from vlmprune.engine import is_hook

F64 = torch.float64
FAMILIES = {"llava": {}, "llava_next": {"family": "llava_next"}}
METHODS = ["fopru", "vtc_cls", "fastv", "random", "grid", "pool"]


def hooks_on(model):
    return [
        hook
        for module in model.modules()
        for hooks in (
            module._forward_pre_hooks,
            module._forward_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
        for hook in hooks.values()
    ]


def state(model):
    """Everything of an instance that a patch could have touched; transformers' own lazy hooks apart."""
    return {
        (name, key): (type(value).__name__ if not isinstance(value, dict | list) else len(value))
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in ("_forward_hooks", "_forward_pre_hooks") and not key.startswith("_is_hooked")
        and not key.startswith("_output_capturing")
    }  # fmt: skip


def assert_clean(model):
    assert not [hook for hook in hooks_on(model) if is_hook(hook) or type(hook).__module__.startswith("vlmprune")]
    for name, module in model.named_modules():
        assert "get_image_features" not in vars(module), name
        flags = {*module._forward_pre_hooks_with_kwargs, *module._forward_hooks_with_kwargs}
        assert flags <= {*module._forward_pre_hooks, *module._forward_hooks}, f"orphaned flags on {name}"


def prompt_of(model):
    return tiny.prompt(model, [4, "image", 6], [(40, 24)])


def logits(model, prompt):
    with torch.no_grad():
        return model(**prompt).logits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
def test_unpatching_leaves_the_model_it_was(options, method):
    model = tiny.model(**options)
    prompt = prompt_of(model)
    plain, tokens = logits(model, prompt), model.generate(**prompt, max_new_tokens=4, do_sample=False)
    before, count = state(model), len(hooks_on(model))
    vlmprune.patch(model, method, keep=0.3)
    assert any(map(is_hook, hooks_on(model)))
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
@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
def test_leaving_the_with_after_an_exception_inside_generate(tiny_model, options, where):
    model = tiny_model(**options)
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
    if name not in vlmprune.registry.names():
        pytest.skip(f"no method {name!r} yet")
    model = tiny_model(dtype=F64)
    prompt, text = prompt_of(model), tiny.prompt(model, [5], [])
    kind = vlmprune.registry.find(name)
    options = {"keep": 0.3} if "keep" in vlmprune.registry.options(kind) else {}
    plain_text = logits(model, text)

    def fail(module, *args):
        raise RuntimeError("out of memory")

    with vlmprune.patch(model, name, **options):
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
            same(logits(model, prompt)[0, -1], reference.run(vlmprune_free(model), prompt, r).logits[0])
        assert len(handle.trace.cuts) == 1
        counts.append(sum(map(is_hook, hooks_on(model))))
    assert counts[0] == counts[1]
    vlmprune.unpatch(model)
    assert_clean(model)


def vlmprune_free(model):
    """A copy without hooks, for the reference."""
    return vlmprune.unpatch(copy.deepcopy(model))


def test_leaving_an_inner_with_leaves_the_model_unpatched(tiny_model):
    model = tiny_model(family="llava_next")
    prompt = prompt_of(model)
    plain = logits(model, prompt)
    with vlmprune.patch(model, "random", keep=3):
        with vlmprune.patch(model, "fopru", keep=3):
            far(logits(model, prompt), plain)
        assert_clean(model)
        assert torch.equal(logits(model, prompt), plain)
    assert_clean(model)
    assert torch.equal(logits(model, prompt), plain)


@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
def test_disabled_is_the_plain_model(tiny_model, options):
    model = tiny_model(**options)
    prompt, forced = prompt_of(model), probes.random_tokens(1, 3)
    plain = probes.forced_logits(model, prompt, forced)
    with vlmprune.patch(model, "vtc_cls", keep=0.3) as handle:
        pruned = probes.forced_logits(model, prompt, forced)
        trace = handle.trace
        with handle.disabled() as same_model:
            assert same_model is model
            assert torch.equal(probes.forced_logits(model, prompt, forced), plain)
            with pytest.raises(KeyError), handle.disabled():
                raise KeyError
            assert torch.equal(probes.forced_logits(model, prompt, forced), plain)
        assert handle.trace is trace
        assert torch.equal(probes.forced_logits(model, prompt, forced), pruned)
        with pytest.raises(KeyError), handle.disabled():
            raise KeyError
        assert torch.equal(probes.forced_logits(model, prompt, forced), pruned)
    far(pruned, plain)


def test_a_generation_under_way_stays_pruned_while_disabled(tiny_model):
    model, rules, forced = tiny_model(dtype=F64), [Rule(0), Rule(2, 2)], probes.random_tokens(1, 3)
    prompt = prompt_of(model)
    length = prompt["input_ids"].shape[1]
    with torch.no_grad():
        want = reference.run(model, prompt, rules, forced[0].tolist()).logits
        with vlmprune.patch(model, probes.rules(*rules)) as handle:
            out = model(**prompt)
            with handle.disabled():
                got = model(input_ids=forced, past_key_values=out.past_key_values,
                            attention_mask=torch.ones(1, length + 3)).logits[0]  # fmt: skip
    same(got, want[1:])


@pytest.mark.parametrize("method", [*METHODS, probes.rules(Rule(0), Rule(2, 2))], ids=str)
@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
def test_copies_of_a_patched_model(options, method, tiny_model):
    """By deepcopy and by pickle: they prune like the original, unpatch by themselves and leave the original alone."""
    model = tiny_model(**options)
    prompt, forced = prompt_of(model), probes.random_tokens(1, 3)
    plain = probes.forced_logits(model, prompt, forced)
    handle = vlmprune.patch(model, method, **({"keep": 0.3} if isinstance(method, str) else {}))
    pruned = probes.forced_logits(model, prompt, forced)
    trace = handle.trace
    # transformers' own hooks, which come with the first forward pass, do not pickle: take a model that has not run
    fresh = tiny.model(**options)
    vlmprune.patch(fresh, method, **({"keep": 0.3} if isinstance(method, str) else {}))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(fresh))):
        assert torch.equal(probes.forced_logits(twin, prompt, forced), pruned)
        assert handle.trace is trace, "the copy writes into the original's trace"
        vlmprune.unpatch(twin)
        assert_clean(twin)
        assert torch.equal(probes.forced_logits(twin, prompt, forced), plain)
        assert torch.equal(probes.forced_logits(model, prompt, forced), pruned)
        trace = handle.trace
    vlmprune.unpatch(model)
    far(pruned, plain)


def test_a_copy_uses_its_own_weights(tiny_model):
    """A hook that remembered a module of the original would look at the wrong weights."""
    model = tiny_model(family="llava_next", dtype=F64)
    other = tiny.model(family="llava_next", dtype=F64, seed=3)
    prompt = prompt_of(model)
    with vlmprune.patch(model, "vtc_cls", keep=0.3) as handle, vlmprune.patch(other, "vtc_cls", keep=0.3):
        want = logits(other, prompt)
        twin = copy.deepcopy(model)
        logits(model, prompt)
        kept = handle.trace.kept()
        twin.load_state_dict(other.state_dict())
        same(logits(twin, prompt), want)
        assert handle.trace.kept() == kept


def test_state_dict_save_and_load(tiny_model, tmp_path):
    model = tiny_model()
    prompt = prompt_of(model)
    plain, keys = logits(model, prompt), list(model.state_dict())
    with vlmprune.patch(model, "vtc_cls", keep=0.3):
        assert list(model.state_dict()) == keys
        model.save_pretrained(tmp_path)
        torch.save(model.state_dict(), io.BytesIO())
    loaded = type(model).from_pretrained(tmp_path)
    assert_clean(loaded)
    assert torch.equal(logits(loaded, prompt), plain)


def test_a_cache_can_be_copied(tiny_model):
    """Prefix caching copies the cache of a prompt and goes on from it."""
    model, rules, forced = tiny_model(dtype=F64), [Rule(0), Rule(2, 2)], probes.random_tokens(1, 3)
    prompt = prompt_of(model)
    length = prompt["input_ids"].shape[1]
    with torch.no_grad():
        want = reference.run(model, prompt, rules, forced[0].tolist()).logits
        with vlmprune.patch(model, probes.rules(*rules)):
            cache = model(**prompt).past_key_values
            for twin in (copy.deepcopy(cache), copy.deepcopy(cache)):
                got = model(input_ids=forced, past_key_values=twin, attention_mask=torch.ones(1, length + 3)).logits[0]
                same(got, want[1:])


# Wrappers


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


class LowRank(nn.Module):
    """Stands for a LoRA layer: its output is not its base weight times the input, and `weight` lies."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features, generator=torch.Generator().manual_seed(0)) / 2)
        self.up = nn.Parameter(torch.randn(base.out_features, 2, generator=torch.Generator().manual_seed(1)) / 2)

    @property
    def weight(self):
        raise AssertionError("taps must call the projection, not read its weight")

    def forward(self, x):
        return self.base(x) + (x @ self.down.to(x).T) @ self.up.to(x).T


@pytest.mark.parametrize("method", ["vtc_cls", "fopru", "fastv"])
def test_taps_call_projections_that_an_adapter_replaced(method):
    model = tiny.model(dtype=F64)
    prompt = prompt_of(model)
    with vlmprune.patch(model, method, keep=5) as handle:
        logits(model, prompt)
        before = handle.trace.cuts[0].scores
    merged = copy.deepcopy(model)
    for one, other in ((model, merged),):
        towers = [*zip(one.model.vision_tower.encoder.layers, other.model.vision_tower.encoder.layers, strict=True)]
        texts = [*zip(one.model.language_model.layers, other.model.language_model.layers, strict=True)]
        for mine, its in towers + texts:
            for name in ("q_proj", "k_proj"):
                low = LowRank(getattr(mine.self_attn, name)).double()
                setattr(mine.self_attn, name, low)
                with torch.no_grad():
                    getattr(its.self_attn, name).weight += low.up @ low.down
    scores = []
    for made in (model, merged):
        with vlmprune.patch(made, method, keep=5) as handle:
            logits(made, prompt)
            scores.append(handle.trace.cuts[0].scores)
    same(*scores)
    far(scores[0], before)


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
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120,
        env={"PYTHONPATH": str(tiny.__file__.rsplit("/", 1)[0]), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
