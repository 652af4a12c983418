"""Copies of a patched model, its saved weights, and copies of its cache."""

from __future__ import annotations

import copy
import io
import pickle

import probes
import pytest
import reference
import tiny
import torch
from leftovers import assert_clean
from probes import far, same
from reference import Rule
from tiny import CACHE

import vlmprune

F64 = torch.float64
METHODS = ["fopru", "vtc_cls", "fastv", "random", "grid", "pool"]


def prompt_of(model):
    return tiny.prompt(model, [4, "image", 6], [(40, 24)])


@pytest.mark.parametrize("method", [*METHODS, probes.rules(Rule(0), Rule(2, 2))], ids=str)
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_copies_of_a_patched_model(family, method, tiny_model):
    """By deepcopy and by pickle: they prune like the original, unpatch by themselves and leave the original alone."""
    model = tiny_model(family=family)
    prompt, forced = prompt_of(model), probes.random_tokens(1, 3)
    plain = probes.forced_logits(model, prompt, forced)
    options = {"keep": 0.3} if isinstance(method, str) else {}
    handle = vlmprune.patch(model, method, **options)
    pruned = probes.forced_logits(model, prompt, forced)
    trace = handle.trace
    # transformers' own hooks, which come with the first forward pass, do not pickle: take a model that has not run
    fresh = tiny.model(family)
    vlmprune.patch(fresh, method, **options)
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


@torch.no_grad()
def test_a_copy_uses_its_own_weights(tiny_model):
    """A hook that remembered a module of the original would look at the wrong weights."""
    model = tiny_model(family="llava_next", dtype=F64)
    other = tiny.model(family="llava_next", dtype=F64, seed=3)
    prompt = prompt_of(model)
    with vlmprune.patch(model, "vtc_cls", keep=0.3) as handle, vlmprune.patch(other, "vtc_cls", keep=0.3):
        want = other(**prompt).logits
        twin = copy.deepcopy(model)
        model(**prompt)
        kept = handle.trace.kept()
        twin.load_state_dict(other.state_dict())
        same(twin(**prompt).logits, want)
        assert handle.trace.kept() == kept


@torch.no_grad()
def test_state_dict_save_and_load(tiny_model, tmp_path):
    model = tiny_model()
    prompt = prompt_of(model)
    plain, keys = model(**prompt).logits, list(model.state_dict())
    with vlmprune.patch(model, "vtc_cls", keep=0.3):
        assert list(model.state_dict()) == keys
        model.save_pretrained(tmp_path)
        torch.save(model.state_dict(), io.BytesIO())
    loaded = type(model).from_pretrained(tmp_path)
    assert_clean(loaded)
    assert torch.equal(loaded(**prompt).logits, plain)


def test_a_cache_can_be_copied(tiny_model):
    """Prefix caching copies the cache of a prompt and goes on from it."""
    model, rules, forced = tiny_model(dtype=F64), [Rule(0), Rule(2, 2)], probes.random_tokens(1, 3)
    prompt = prompt_of(model)
    length = prompt["input_ids"].shape[1]
    with torch.no_grad():
        want = reference.run(model, prompt, rules, forced[0].tolist()).logits
        with vlmprune.patch(model, probes.rules(*rules)):
            cache = model(**prompt)[CACHE]
            for twin in (copy.deepcopy(cache), copy.deepcopy(cache)):
                got = model(input_ids=forced, **{CACHE: twin}, attention_mask=torch.ones(1, length + 3)).logits[0]
                same(got, want[1:])
