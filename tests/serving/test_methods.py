"""Served answers are those of vlmprune on transformers, tokens and log-probabilities.

Every method that is served, at two budgets (the engine's own, and one that requests bring), on every family.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import scenes
import serving_models
import torch
from serving_engine import agree, clear, content_number, expected, questions

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
#: Of scene-qwen's four tower layers two see all of a picture, and not those that these read by themselves.
SEES_ALL = {
    "vtc_cls": {"fallback": "received", "start_layer": 1},
    "tcc": {"fallback": "received", "shallow": 6, "deep": 6},
}
BUDGETS = {"tome": (64, 0.5), "pitome": (64, 0.5)}  # at most half of the tokens can go in each of four layers


def served(model):
    """The methods that vLLM can be given on a model, those with a documented fallback too."""
    family, fallback = MODELS[model][0], fallbacks(model)
    return [n for n in registry.names() if family not in refusals(registry.find(n), **fallback.get(n, {}))]


def fallbacks(model):
    """Options of methods where the tower has no [CLS] token."""
    if model == "scene-qwen":
        return scenes.FALLBACK | SEES_ALL
    return scenes.FALLBACK if model == "onevision" else {}


#: A noise of one part in ten millions on what it sees exchanges a third of what vispruner keeps of several views: its
#: rounds pair tokens by their order. So it hangs on who rounds, here as on transformers itself.
ROUNDED = {("scene-llava-next", "vispruner"), ("onevision", "vispruner")}
CASES = [(model, name) for model in MODELS for name in served(model) if (model, name) not in ROUNDED]


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


@pytest.mark.parametrize(("model", "name"), sorted(ROUNDED))
def test_of_what_rounding_decides_everything_else_is_equal(engines, onevision, model, name, monkeypatch):
    """The same is seen to the last digits, as many are kept, and of the same choice the answers are the same."""
    cls, keep = registry.find(name), MODELS[model][1]
    own, made, exchanged = cls.reduce, [], []

    def note(self, seen, layout):
        made.append((list(seen.values()), own(self, seen, layout)))
        return made[-1][1]

    def follow(self, seen, layout):
        (there, told), mine = made[0], own(self, seen, layout)
        for one, other in zip(seen.values(), there, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert mine.counts == told.counts
        exchanged.append((mine.keep & ~told.keep).sum().item() / mine.counts[0])
        return replace(mine, keep=told.keep)

    folder = onevision if model == "onevision" else model
    prompts = serving_models.prompts(60) if model == "onevision" else questions(model)
    engine, found, wanted = engines(folder, name, keep=keep), [], []
    for prompt in prompts:
        clear(engine.llm)
        monkeypatch.setattr(cls, "reduce", note)
        found += engine.ask([prompt])
        del made[:-1]  # before it there may be noise
        monkeypatch.setattr(cls, "reduce", follow)
        wanted += expected(folder, [prompt], name, keep=keep)
    print("worst", agree(found, wanted), "exchanged", exchanged)


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
