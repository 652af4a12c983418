"""How many tokens stay, asked without a model's weights, is what stays on transformers."""

from __future__ import annotations

import pytest
import scenes
import tiny
import torch

import vlmprune
from vlmprune import registry
from vlmprune.engine.plan import Plan
from vlmprune.patches import family_of
from vlmprune.serving.choice import SERVED, Choice, refusals
from vlmprune.spec import build

FAMILIES = {
    "llava": {},
    "llava_next": {"family": "llava_next"},
    "llava_onevision": {"family": "llava_onevision", "tower": "siglip", "text": "qwen2"},
}
SIZES = [(40, 24), (20, 70), (90, 96)]


ANYRES = ["divprune", "fopru", "grid", "pool", "random", "todre", "visionzip", "vtc_cls"]
ANYRES += ["fastervlm", "hiprune", "holov", "prumerge", "prumerge_plus", "prunesid", "scope", "vispruner", "vscan"]
CASES = [(family, name) for family in FAMILIES for name in ANYRES] + [("llava", "tome"), ("llava", "pitome")]
CASES += [("llava_next", "globalcom2_fixed"), ("llava_onevision", "globalcom2_fixed")]


@pytest.mark.parametrize("keep", [5, 0.3])
@pytest.mark.parametrize(("family", "name"), CASES)
def test_counts_are_those_of_transformers(family, name, keep):
    cls, model = registry.find(name), tiny.shared(**FAMILIES[family])
    fallback = scenes.FALLBACK.get(name, {}) if model.config.model_type == "llava_onevision" else {}
    options = {"keep": 8 if name in ("tome", "pitome") and keep == 5 else keep, **cls.served_with, **fallback}
    served, inner = family_of(model), family_of(model).inner(model)
    choice = Choice(build(name, options), served, served.facts(inner))
    choice.check()
    for seed, size in enumerate(SIZES if served.needs_sizes else SIZES[:1]):
        grid = Plan(served, choice.plan.facts, []).grid(inner, "image", size if served.needs_sizes else None)
        if grid.blend is not None and "shrunk" in cls.refuses_inputs:
            with pytest.raises(vlmprune.UnsupportedError, match="merges patches"):
                choice.count(grid)
            continue
        prompt = tiny.prompt(model, [3, "image", 4], [size], seed=seed, together=True)
        with torch.no_grad(), vlmprune.patch(model, name, **options) as handle:
            model(**prompt)
        assert choice.count(grid) + 7 == handle.trace.kv_lengths[0]


def test_what_is_refused_says_why():
    assert set(refusals(registry.find("fastv"))) == set(SERVED)
    assert set(refusals(registry.find("todre"))) == {"llava_onevision", "qwen2_5_vl", "qwen3_vl"}  # no [CLS]
    assert not refusals(registry.find("todre"), pivot="mean")
    assert set(refusals(registry.find("tome"))) == set(SERVED) - {"llava"}
