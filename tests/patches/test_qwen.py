"""Every method on every family of Qwen-VL: what its trace says is what the model computed, by hand and in float64.

The full product runs in `make test-all`; every run has a part of it that `chosen` picks: each method on some of the
scenes, and each scene with some of the methods, in every feature.
"""

from __future__ import annotations

import pytest
import reference
import tiny
import torch
from scenes import FORCED, QWEN, REFUSED, Scene, replay, start, with_cache

from vlmprune import registry

NAMES = registry.names()
FEATURES = ["exact", "batches", "right padding", "beam search"]


def refused(label, name):
    return (name, QWEN[label][0]["family"]) in REFUSED


def chosen(feature, number, label, name):
    """Whether every run has a cell of the product."""
    able = [other for other in NAMES if not refused(label, other)]
    if name not in able:
        return feature == "exact"
    return (able.index(name) + FEATURES.index(feature)) % len(QWEN) == number


def product(feature):
    cells = [
        pytest.param(label, name, marks=[] if chosen(feature, number, label, name) else [pytest.mark.exhaustive])
        for number, label in enumerate(QWEN)
        for name in NAMES
    ]
    return pytest.mark.parametrize(("label", "name"), cells)


@product("exact")
def test_what_the_trace_says_is_what_was_computed(label, name):
    """Several pictures in one row, with videos among them; then forced tokens, one by one."""
    scene = Scene(*QWEN[label])
    model, prompt = scene.model, scene.prompt(name)
    with torch.no_grad(), start(scene, name) as handle:
        got = with_cache(model, prompt)[:, 0]
        features = reference.image_features(model, prompt), reference.video_features(model, prompt)
        added = reference.injected(model, prompt, prompt["input_ids"].shape[1] + len(FORCED))
    trace = handle.trace
    with torch.no_grad():
        want, cut = replay(model, prompt, features, trace, added=added)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        assert cut or name == "m3"  # which has no smaller scale of a grid with an odd side
        # forced tokens that count on by columns; a kept token taken for a dropped one
        twins = [{"positions": "counted"}] * cut + [{"wrong": True}] * (cut and trace.cuts[-1].merge is None)
        for twin in twins:
            astray = replay(model, prompt, features, trace, added=added, **twin)[0]
            assert (astray - got)[1:].abs().max() > 1e-5, twin


@pytest.mark.parametrize("side", ["left", "right"])
@product("batches")
def test_a_row_of_a_batch_is_the_sample_alone(label, name, side):
    scene = Scene(*QWEN[label])
    model, prompts = scene.model, scene.rows(name)
    with torch.no_grad(), start(scene, name):
        together = with_cache(model, tiny.batch(prompts, side))
        for row, prompt in enumerate(prompts):
            alone = with_cache(model, prompt)[:, 0]
            torch.testing.assert_close(together[:, row], alone, rtol=1e-9, atol=1e-9)


@product("beam search")
def test_beams_and_unpatching(label, name):
    scene = Scene(*QWEN[label])
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
