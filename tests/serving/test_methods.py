"""Served answers are those of vlmprune on transformers, tokens and log-probabilities.

Every method that is served, at two budgets (the engine's own, and one that requests bring), on every family.
"""

from __future__ import annotations

import pytest
import scenes
import serving_models
from serving_engine import agree, content_number, expected, questions

from vlmprune import registry
from vlmprune.serving.choice import refusals

pytestmark = pytest.mark.vllm

#: Model, its family, and two budgets.
MODELS = {
    "scene-llava": ("llava", 64, 0.1),
    "scene-llava-next": ("llava_next", 128, 0.1),
    "onevision": ("llava_onevision", 40, 0.2),
    "scene-qwen": ("qwen2_5_vl", 24, 0.15),
}
BUDGETS = {"tome": (64, 0.5), "pitome": (64, 0.5)}  # at most half of the tokens can go in each of four layers


def served(model):
    """The methods that vLLM can be given on a model, those with a documented fallback too."""
    family, fallback = MODELS[model][0], fallbacks(model)
    return [n for n in registry.names() if family not in refusals(registry.find(n), **fallback.get(n, {}))]


def fallbacks(model):
    """Options of methods where the tower has no [CLS] token."""
    return scenes.FALLBACK if model in ("onevision", "scene-qwen") else {}


CASES = [(model, name) for model in MODELS for name in served(model)]


@pytest.fixture(scope="module")
def onevision(tmp_path_factory):
    return serving_models.save(tmp_path_factory.mktemp("models") / "onevision", "onevision")


@pytest.mark.parametrize(("model", "name"), CASES)
def test_every_served_method_at_two_budgets(engines, onevision, model, name, record_property):
    cls, (_, first, second) = registry.find(name), MODELS[model]
    first, second = BUDGETS.get(name, (first, second))
    options = {"keep": first, **cls.served_with, **fallbacks(model).get(name, {})}
    if model == "onevision":
        model, prompts = onevision, serving_models.prompts(60, shrunk="shrunk" not in cls.refuses_inputs)
        options |= scenes.FALLBACK.get(name, {})
    else:
        prompts = questions(model)
    prompts += [prompt.at(second) for prompt in prompts]
    engine = engines(model, name, **options)
    found = engine.ask(prompts)
    wanted = []
    for prompt in prompts:
        if "seed" in registry.options(cls):  # to which a number of the picture's content is added
            options["seed"] = content_number(engine, prompt.images[0])
        wanted += expected(model, [prompt], name, **options)
    record_property("worst", agree(found, wanted))


SETTINGS = [
    ("fopru", {"keep": 25, "strategy": "row"}),
    ("fopru", {"keep": 0.25, "score": "cls"}),
    ("todre", {"keep": 25, "tau": None, "objective": "max_min", "pivot": "mean"}),
    ("visionzip", {"keep": 64, "contextual": 0.5}),
    ("tome", {"keep": 128, "place": "behind"}),
    ("vscan", {"keep": 64, "layer": None}),
    ("vtc_cls+divprune", {"vtc_cls.keep": 128, "divprune.keep": 0.5}),
]


@pytest.mark.parametrize(("method", "options"), SETTINGS)
def test_options_mean_what_they_mean_on_transformers(engines, method, options, record_property):
    prompts = questions("scene-llava")
    found = engines("scene-llava", method, **options).ask(prompts)
    record_property("worst", agree(found, expected("scene-llava", prompts, method, **options)))


def test_an_unpruned_engine_answers_as_transformers(engines):
    prompts = questions("scene-llava")
    agree(engines("scene-llava", "fopru", keep=1.0).ask(prompts), expected("scene-llava", prompts))
