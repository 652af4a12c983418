"""Every method on GLM-4.1V: what its trace says is what the model computed, by hand and in float64."""

from __future__ import annotations

import pytest
import reference
import tiny
import torch
from scenes import OWN, Scene, replay, start, told, with_cache

from vlmprune import UnsupportedError, registry

KINDS = ("glm-4v", "glm-4v-video")
NAMES = registry.names()


def cells():
    """Every method on pictures and on videos; each on one of the two in every run."""
    for number, name in enumerate(NAMES):
        for place, kind in enumerate(KINDS):
            often = number % len(KINDS) == place
            yield pytest.param(kind, name, marks=[] if often else [pytest.mark.exhaustive])


@pytest.mark.parametrize(("kind", "name"), list(cells()))
def test_what_the_trace_says_is_what_was_computed(kind, name, support):
    """In one row with forced tokens behind it, in batches padded on both sides, with beams; and unpatched again."""
    scene = Scene(*OWN[kind])
    model, prompt = scene.model, scene.prompt(name)
    for feature in ("exact", "batches", "right padding", "unpatching"):
        support(feature, kind, name, refused=told(scene.refused(name)))
    with torch.no_grad():
        before = model(**prompt).logits
    handle = start(scene, name)
    with torch.no_grad(), handle:
        got = with_cache(model, prompt)[:, 0]
        trace, rows = handle.trace, scene.rows(name)
        alone = [with_cache(model, row)[:, 0] for row in rows]
        for side in ("left", "right"):
            together = with_cache(model, tiny.batch(rows, side))
            for row, each in enumerate(alone):
                torch.testing.assert_close(together[:, row], each, rtol=1e-9, atol=1e-9)
    features = reference.image_features(model, prompt), reference.video_features(model, prompt)
    with torch.no_grad():
        want, cut = replay(model, prompt, features, trace)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        assert cut or name == "m3"
        twins = [{"positions": "counted"}] * cut + [{"wrong": True}] * (cut and trace.cuts[-1].merge is None)
        for twin in twins:
            assert (replay(model, prompt, features, trace, **twin)[0] - got)[1:].abs().max() > 1e-5, twin
        assert torch.equal(model(**prompt).logits, before)


@pytest.mark.parametrize("name", ["fopru", "fastv", "divprune"])
def test_beams(name, support):
    """One picture a prompt is right; the host loses the features of videos, unpruned as well."""
    asked = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    support("beam search", KINDS[0], name)
    pictures, films = (Scene(*OWN[kind]) for kind in KINDS)
    with torch.no_grad(), start(pictures, name):
        prompts = pictures.questions()
        out = pictures.model.generate(**tiny.batch(prompts), **asked)
        for row, prompt in enumerate(prompts):
            assert out[row, -5:].tolist() == pictures.model.generate(**prompt, **asked)[0, -5:].tolist()
        with pytest.raises(UnsupportedError, match="beams, or several answers, to prompts with videos"):
            films.model.generate(**films.questions()[0], **asked)
