"""Every method on every family of Qwen-VL: what its trace says is what the model computed, by hand and in float64.

The full product runs in `make test-all`; every run has a part of it that `chosen` picks: each method on some of the
scenes, and each scene with some of the methods, in every feature.
"""

from __future__ import annotations

import copy

import probes
import pytest
import reference
import tiny
import torch
from scenes import FORCED, QWEN, REFUSED, Scene, replay, start, told, with_cache
from tiny import CACHE

from vlmprune import registry

NAMES = registry.names()
FEATURES = ["exact", "batches", "beam search", "static cache", "second turn, text"]
FEW = FEATURES[3:]  # of which every run has one method a scene
ROUTED = 1e-5  # of experts, whose weights are computed in float32 whatever the model is


def refused(label, name):
    return (name, QWEN[label][0]["family"]) in REFUSED


def chosen(feature, number, label, name):
    """Whether every run has a cell of the product."""
    able = [other for other in NAMES if not refused(label, other)]
    if name not in able:
        return feature == "exact"
    if feature in FEW:
        return name == able[(5 * number + FEATURES.index(feature)) % len(able)]
    return (able.index(name) + FEATURES.index(feature)) % len(QWEN) == number


def product(feature):
    cells = [
        pytest.param(label, name, marks=[] if chosen(feature, number, label, name) else [pytest.mark.exhaustive])
        for number, label in enumerate(QWEN)
        for name in NAMES
        if feature == "exact" or not refused(label, name)
    ]
    return pytest.mark.parametrize(("label", "name"), cells)


def same(label, got, want):
    probes.same(got.to(want), want, ROUTED if label.endswith("moe") else 1e-9)


def claim(support, scene, name, *features):
    for feature in features:
        support(feature, scene, name, refused=told(scene.refused(name)))


def features_of(model, prompt):
    return reference.image_features(model, prompt), reference.video_features(model, prompt)


@product("exact")
def test_what_the_trace_says_is_what_was_computed(label, name, support):
    """Several pictures in one row, with videos among them; then forced tokens, one by one."""
    scene = Scene(*QWEN[label])
    claim(support, scene, name, "exact")
    model, prompt = scene.model, scene.prompt(name)
    with torch.no_grad(), start(scene, name) as handle:
        got = with_cache(model, prompt)[:, 0]
        features = features_of(model, prompt)  # of the patched tower: what it reads may be less
        added = reference.injected(model, prompt, prompt["input_ids"].shape[1] + len(FORCED))
    trace = handle.trace
    with torch.no_grad():
        want, cut = replay(model, prompt, features, trace, added=added)
        same(label, got, want)
        assert cut or name == "m3"  # which has no smaller scale of a grid with an odd side
        # forced tokens that count on by columns; a kept token taken for a dropped one
        twins = [{"positions": "counted"}] * cut + [{"wrong": True}] * (cut and trace.cuts[-1].merge is None)
        for twin in twins:
            astray = replay(model, prompt, features, trace, added=added, **twin)[0]
            assert (astray - got)[1:].abs().max() > (1e-3 if label.endswith("moe") else 1e-5), twin


@pytest.mark.parametrize("side", ["left", "right"])
@product("batches")
def test_a_row_of_a_batch_is_the_sample_alone(label, name, side, support):
    scene = Scene(*QWEN[label])
    claim(support, scene, name, "right padding" if side == "right" else "batches")
    model, prompts = scene.model, scene.rows(name)
    with torch.no_grad(), start(scene, name):
        together = with_cache(model, tiny.batch(prompts, side))
        for row, prompt in enumerate(prompts):
            same(label, together[:, row], with_cache(model, prompt)[:, 0])


@product("beam search")
def test_beams_and_unpatching(label, name, support):
    scene = Scene(*QWEN[label])
    claim(support, scene, name, "beam search", "unpatching")
    model, prompts = scene.model, scene.questions(name)
    both = tiny.batch(prompts)
    with torch.no_grad():
        before = model(**both).logits
        with start(scene, name):
            for beams in (1, 3):
                asked = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
                out = model.generate(**both, **asked)
                for row, prompt in enumerate(prompts):
                    assert out[row, -5:].tolist() == model.generate(**prompt, **asked)[0, -5:].tolist()
        assert torch.equal(model(**both).logits, before)


@product("static cache")
def test_a_static_cache(label, name, support):
    scene = Scene(*QWEN[label])
    claim(support, scene, name, "static cache")
    model, prompt, forced = scene.model, scene.prompt(name), torch.tensor([FORCED])
    with torch.no_grad(), start(scene, name) as handle:
        asked = {"cache_implementation": "static", "disable_compile": True}
        got = probes.generated_logits(model, prompt, forced, **asked)[0]
        trace, features = handle.trace, features_of(model, prompt)
        added = reference.injected(model, prompt, prompt["input_ids"].shape[1] + len(FORCED))
    with torch.no_grad():
        same(label, got, replay(model, prompt, features, trace, added=added)[0])


@product("second turn, text")
def test_a_later_turn_of_text(label, name, support):
    """By a call of the model, and through `generate` with all ids; another conversation was held in between."""
    scene = Scene(*QWEN[label])
    claim(support, scene, name, "second turn, text")
    model, prompt, said, text = scene.model, scene.prompt(name), FORCED[:2], [11, 44, 23]
    with torch.no_grad(), start(scene, name) as handle:
        out = model(**prompt, use_cache=True)
        trace, cache = handle.trace, out[CACHE]
        for token in said:
            model(input_ids=torch.tensor([[token]]), **{CACHE: cache}, use_cache=True)
        with_cache(model, scene.questions()[0])
        again, ids = copy.deepcopy(cache), torch.cat((prompt["input_ids"], torch.tensor([said + text])), 1)
        everything = {"attention_mask": torch.ones_like(ids)}
        out = model(input_ids=ids[:, -3:], **everything, **{CACHE: cache}, use_cache=True)
        asked = {"input_ids": ids} | everything
        got = probes.generated_logits(model, asked, torch.tensor([FORCED]), **{CACHE: again})[0]
        want = replay(model, prompt, features_of(model, prompt), trace, forced=said + text + FORCED)[0]
    same(label, out.logits[0], want[3:6])
    same(label, got, want[5:])


def test_every_run_has_each_scene_with_each_feature_and_each_method():
    for feature in FEATURES:
        for number, label in enumerate(QWEN):
            assert any(chosen(feature, number, label, name) for name in NAMES if not refused(label, name))
        for name in NAMES if feature not in FEW else []:
            able = [label for label in QWEN if not refused(label, name)]
            ran = [chosen(feature, number, label, name) for number, label in enumerate(QWEN) if label in able]
            assert any(ran) or not able
