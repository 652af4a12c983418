"""Every registered method on every family: what its trace says it did is what the model computed.

A new method joins by being registered. Whatever it decides, the rest is the engine's: the decision is taken from the
trace and carried out by hand, layer by layer.
"""

from __future__ import annotations

import pytest
import reference
import tiny
import torch
from scenes import FAMILIES, Scene, claim, replay, start, with_cache

from vlmprune import registry

NAMES = registry.names()


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def scene(request):
    return Scene(*request.param)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_trace_says_is_what_was_computed(scene, name, support):
    claim(support, scene, name, "exact")
    model, prompt = scene.model, scene.prompt(name)
    with torch.no_grad(), start(scene, name) as handle:
        got = with_cache(model, prompt)[:, 0]
        features = reference.image_features(model, prompt), reference.video_features(model, prompt)
    trace = handle.trace
    with torch.no_grad():
        want, cut = replay(model, prompt, features, trace)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        assert cut or name == "downsample"
        if cut:
            other = "original" if trace.cuts[0].positions == "contiguous" else "contiguous"
            for twin in ({"positions": other}, *([] if trace.cuts[-1].merge is not None else [{"wrong": True}])):
                assert (replay(model, prompt, features, trace, **twin)[0] - got).abs().max() > 1e-7, twin


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_a_batch_is_the_sample_alone(scene, name, support):
    claim(support, scene, name, "batches", "right padding")
    model, prompts = scene.model, scene.rows(name)
    with torch.no_grad(), start(scene, name):
        alone = [with_cache(model, prompt)[:, 0] for prompt in prompts]
        for side in ("left", "right"):
            together = with_cache(model, tiny.batch(prompts, side))
            # a sliding window counts columns: padding between prompt and answer takes its place in any layer it reaches
            steps = 1 if side == "right" and "sliding_window" in scene.options else None
            for row, want in enumerate(alone):
                torch.testing.assert_close(together[:steps, row], want[:steps], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_beams_and_unpatching(scene, name, support):
    claim(support, scene, name, "beam search", "unpatching")
    model, prompts = scene.model, scene.questions()
    both = tiny.batch(prompts)
    with torch.no_grad():
        before = model(**both).logits
        with start(scene, name):
            for beams, steps in ((1, 2), (3, 3)):
                asked = {"max_new_tokens": steps, "do_sample": False, "num_beams": beams}
                out = model.generate(**both, **asked)
                for row, prompt in enumerate(prompts):
                    assert out[row, -steps:].tolist() == model.generate(**prompt, **asked)[0, -steps:].tolist()
        assert torch.equal(model(**both).logits, before)
