"""The cache's name, and hosts that hand a cache on as no supported release does: each is broken on purpose."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path

import probes
import pytest
import tiny
import torch
from tiny import CACHE
from transformers import DynamicCache
from transformers.models.llama import modeling_llama
from transformers.models.llava.modeling_llava import LlavaModel

import vlmprune
from vlmprune import UnsupportedError
from vlmprune.patches import host

METHODS = {"random": {"keep": 4}, "fastv": {"keep": 4}}  # a cut in front of layer 0, and one behind


def prompt_of(model):
    return tiny.prompt(model, [4, "image", 6], [(24, 24)])


def step(model, cache, length):
    mask, position = torch.ones(1, length + 1, dtype=torch.long), torch.tensor([[length]])
    return {"input_ids": torch.tensor([[9]]), "attention_mask": mask, "position_ids": position, CACHE: cache}


def renamed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """A copy of transformers' Llama whose decoder layers call their cache `memory`."""
    head, start, layer = inspect.getsource(modeling_llama).partition("class LlamaDecoderLayer")
    for old, new in (  # the layer's argument, what it hands to its attention, and what the model hands to it
        (
            f" {CACHE}: Cache | None = None,\n        use_cache: bool",
            " memory: Cache | None = None,\n        use_cache: bool",
        ),
        (f" {CACHE}={CACHE},\n            use_cache=use_cache,\n            pos", f" {CACHE}=memory,\n            pos"),
        (f" {CACHE}={CACHE},\n                use_cache", f" memory={CACHE},\n                use_cache"),
    ):
        assert old in layer, old
        layer = layer.replace(old, new, 1)
    source = (head + start + layer).replace("from ...", "from transformers.")
    file = folder / "modeling_llama_renamed.py"
    file.write_text(source.replace("from .config", "from transformers.models.llama.config"))
    spec = importlib.util.spec_from_file_location("transformers.models.llama.modeling_llama_renamed", file)
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, made)
    spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_decoder_layers_that_call_their_cache_otherwise(tmp_path, monkeypatch, method):
    model = tiny.model(dtype=torch.float64)
    prompt, forced = prompt_of(model), probes.random_tokens(1, 2)
    plain = probes.forced_logits(model, prompt, forced)
    copied = renamed(tmp_path, monkeypatch)
    model.model.language_model.__class__ = copied.LlamaModel
    for layer in model.model.language_model.layers:
        layer.__class__ = copied.LlamaDecoderLayer
    probes.same(probes.forced_logits(model, prompt, forced), plain)  # the copy is right
    with vlmprune.patch(model, method, **METHODS[method]):
        with pytest.raises(UnsupportedError, match=f"under the name 'memory', and vlmprune knows '{CACHE}'"):
            model(**prompt, use_cache=True)
        with pytest.raises(UnsupportedError, match="under the name 'memory'"):
            model.generate(**prompt, max_new_tokens=3)


class RenamedInner(LlavaModel):
    """Calls its cache `memory`, and all that it calls as ever."""

    def forward(self, input_ids=None, memory=None, **kwargs):
        return super().forward(input_ids=input_ids, **{CACHE: memory}, **kwargs)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_model_that_calls_its_cache_otherwise(method):
    model = tiny.model(dtype=torch.float64)
    prompt, inner = prompt_of(model), model.model
    length = prompt["input_ids"].shape[1]
    with vlmprune.patch(model, method, **METHODS[method]):
        cache = inner(**prompt, use_cache=True)[CACHE]
        good = inner(**step(model, cache, length)).last_hidden_state
        inner.__class__ = RenamedInner
        cache = inner(**prompt, use_cache=True)[CACHE]  # made inside: the hooks see it where the layers get it
        later = step(model, cache, length)
        later["memory"] = later.pop(CACHE)
        with pytest.raises(UnsupportedError, match="under the name 'memory'"):
            inner(**later)
        inner.__class__ = LlavaModel
        probes.same(inner(**step(model, cache, length)).last_hidden_state, good)


class HiddenCache(modeling_llama.LlamaDecoderLayer):
    """Gets its cache where no hook sees it."""

    def __call__(self, *args, **kwargs):
        self.memory = kwargs.pop(CACHE)
        return super().__call__(*args, **kwargs)

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs, **{CACHE: self.memory})


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_cache_that_is_handed_back_and_was_never_seen(method):
    model = tiny.model(dtype=torch.float64)
    prompt = prompt_of(model)
    for layer in model.model.language_model.layers:
        layer.__class__ = HiddenCache
    with vlmprune.patch(model, method, **METHODS[method]):
        with pytest.raises(UnsupportedError, match="handed back a filled cache"):
            model(**prompt, use_cache=True)
        model(**prompt, use_cache=False)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_later_call_that_does_not_come_by_the_model(method):
    """Around the model to its language model, or through a wrapper that loses what our hooks hand on."""
    model = tiny.model(dtype=torch.float64)
    prompt = prompt_of(model)
    length, language = prompt["input_ids"].shape[1], model.model.language_model
    with vlmprune.patch(model, method, **METHODS[method]):
        cache = model(**prompt, use_cache=True)[CACHE]
        later = step(model, cache, length)
        with pytest.raises(UnsupportedError, match="by a call that the patch did not see"):
            language(**later)
        forward = language.forward
        language.forward = lambda **kwargs: forward(**{k: v for k, v in kwargs.items() if "vlmprune" not in k})
        with pytest.raises(UnsupportedError, match="by a call that the patch did not see"):
            model(**later)
        language.forward = forward
        model(**later)
        plain = DynamicCache(config=model.config.text_config)
        language(input_ids=torch.tensor([[9, 8]]), **{CACHE: plain})  # of a cache of its own nobody minds


@torch.no_grad()
def test_the_old_name_goes_on_as_an_alias(tiny_model):
    """Users have written `past_key_values=` for years, and transformers still takes it."""
    model, forced = tiny_model(dtype=torch.float64), probes.random_tokens(1, 1)
    prompt = prompt_of(model)
    length = prompt["input_ids"].shape[1]
    for method, options in METHODS.items():
        with vlmprune.patch(model, method, **options):
            want = probes.forced_logits(model, prompt, forced)[:, 1]
            for called in (model, model.model):
                cache = DynamicCache(config=model.config.text_config)
                called(**probes.step_inputs(prompt), past_key_values=cache)
                later = step(model, cache, length) | {"input_ids": forced}
                later["past_key_values"] = later.pop(CACHE)
                out = called(**later)
                got = out.logits[:, -1] if called is model else model.lm_head(out.last_hidden_state[:, -1])
                probes.same(got, want)


def test_what_is_read():
    cache = DynamicCache()
    assert host.cache_of({}) is None
    assert host.cache_of({CACHE: cache, "use_cache": True}) is cache
    assert host.cache_of({"past_key_values": cache}) is cache
    assert host.with_cache(cache) == {CACHE: cache}
    with pytest.raises(UnsupportedError, match="'kv'"):
        host.cache_of({CACHE: None, "kv": cache})


@pytest.mark.parametrize("options", [{}, {"family": "llava_next"}, {"family": "llava_onevision", "text": "qwen2"}])
@torch.no_grad()
def test_wrong_positions_of_a_cached_step_show_in_the_models_that_the_tests_use(tiny_model, options):
    """Equalities of decode tests hold to 1e-5 in float32: what hooks do there must matter a hundred times as much."""
    model, forced = tiny_model(**options), probes.random_tokens(1, 1)
    prompt = prompt_of(model)
    later = step(model, None, prompt["input_ids"].shape[1]) | {"input_ids": forced, "attention_mask": None}
    for method, more in (("random", {}), ("fastv", {"positions": "contiguous"})):
        with vlmprune.patch(model, method, keep=12, **more):
            right = probes.forced_logits(model, prompt, forced)[:, 1]
            cache = model(**prompt, use_cache=True)[CACHE]
        wrong = model(**(later | {CACHE: cache})).logits[:, -1]  # without our hooks
        probes.far(wrong, right, probes.TOLERANCE[torch.float32])


@torch.no_grad()
def test_nothing_of_ours_is_on_what_the_model_returns(tiny_model):
    model = tiny_model()
    with vlmprune.patch(model, "fopru", keep=4):
        out = model(**prompt_of(model))
    encoded = getattr(out, "image_outputs", None)  # since transformers 5.24
    assert not [name for name in vars(encoded or out) if "vlmprune" in name]
