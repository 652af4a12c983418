"""Served answers are those of vlmprune on transformers: tokens and log-probabilities."""

from __future__ import annotations

import pytest
from serving_engine import agree, expected, questions

pytestmark = pytest.mark.vllm

SETTINGS = [
    ("fopru", {"keep": 64}),
    ("fopru", {"keep": 25, "strategy": "row"}),
    ("fopru", {"keep": 0.25, "score": "cls"}),
    ("vtc_cls", {"keep": 64}),
    ("vtc_cls", {"keep": 25}),
    ("divprune", {"keep": 64}),
    ("divprune", {"keep": 0.1}),
    ("todre", {"keep": 64, "tau": None}),
    ("todre", {"keep": 25, "tau": None}),
    ("grid", {"keep": 64}),
    ("grid", {"keep": 25}),
    ("pool", {"keep": 64}),
    ("pool", {"keep": 25}),
    ("visionzip", {"keep": 64}),
    ("visionzip", {"keep": 0.1}),
    ("tome", {"keep": 64}),
    ("tome", {"keep": 128, "place": "behind"}),
    ("pitome", {"keep": 64}),
    ("vispruner", {"keep": 64}),
    ("fastervlm", {"keep": 25}),
    ("hiprune", {"keep": 64}),
    ("holov", {"keep": 64}),
    ("prunesid", {"keep": 64}),
    ("scope", {"keep": 25}),
    ("vscan", {"keep": 64, "layer": None}),
    ("prumerge", {"keep": 64}),
    ("prumerge_plus", {"keep": 25}),
    ("vtc_cls+divprune", {"vtc_cls.keep": 128, "divprune.keep": 0.5}),
]


@pytest.mark.parametrize(("method", "options"), SETTINGS)
@pytest.mark.parametrize("model", ["scene-llava"])
def test_answers_are_those_of_transformers(engines, model, method, options, record_property):
    prompts = questions(model)
    worst = agree(engines(model, method, **options).ask(prompts), expected(model, prompts, method, **options))
    record_property("worst", worst)


def test_an_unpruned_engine_answers_as_transformers(engines):
    prompts = questions("scene-llava")
    agree(engines("scene-llava", "fopru", keep=1.0).ask(prompts), expected("scene-llava", prompts))
