"""Served answers are those of vlmprune on transformers, tokens and log-probabilities.

Every method that is served, at two budgets (the engine's own, and one that requests bring), on every family.
"""

from __future__ import annotations

import pytest
import scenes
import serving_models
import torch
from serving_engine import agree, answer, clear, content_number, deciding, expected, questions, reference

import vlmprune
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


#: Where a noise of one part in a million on what a method sees changes what it does, so that it hangs on who rounds,
#: here as on transformers itself: vispruner's rounds pair patches by their order, vscan lets a patch flow into the kept
#: one that is most like it, prunesid groups patches by eigenvectors. For how many prompts of 120 at most, and how far
#: apart is what is seen at most, as a share of the largest value: the random tower's large numbers round worse.
ROUNDED = {
    ("scene-llava", "vispruner"): (24, 1e-5),
    ("scene-llava-next", "vispruner"): (120, 1e-5),
    ("onevision", "vispruner"): (24, 2e-3),
    ("scene-llava-next", "vscan"): (40, 1e-5),
    ("scene-llava-next", "prunesid"): (24, 1e-5),
}
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
        prompts = questions(model, every=6)  # as many pictures
    prompts += [prompt.at(second) for prompt in prompts]
    engine = engines(model, name, **options)
    found = engine.ask(prompts)
    if "seed" in registry.options(cls):  # to which a number of the picture's content is added
        seeds = [content_number(engine, prompt.images[0]) for prompt in prompts]
        pairs = zip(prompts, seeds, strict=True)
        wanted = [one for prompt, seed in pairs for one in expected(model, [prompt], name, **options, seed=seed)]
    else:
        wanted = expected(model, prompts, name, **options)
    record_property("worst", agree(found, wanted))


@pytest.mark.parametrize(("model", "name"), sorted(ROUNDED))
def test_where_rounding_decides_all_else_is_equal(engines, onevision, model, name, record_property):
    """The same is seen but for rounding and as many are kept; of the same choice the answers are the same."""
    cls, (_, first, second) = registry.find(name), MODELS[model]
    options = {"keep": first, **cls.served_with, **fallbacks(model).get(name, {})}
    folder = onevision if model == "onevision" else model
    prompts = serving_models.prompts(60) if model == "onevision" else questions(model, every=6)
    engine, found, wanted, off, other = engines(folder, name, **options), [], [], [], 0
    for keep in (first, second):
        plan = engine.inner.served.choice(keep).plan
        handle = vlmprune.patch(reference(folder)[0], name, **options | {"keep": keep})
        for prompt in prompts:
            clear(engine.llm)
            with deciding(plan, noting(noted := [])):
                found += engine.ask([prompt.at(keep)])
            ((there, told),) = noted
            with deciding(handle._plan, noting(noted, told)):
                wanted.append(answer(folder, prompt, handle, nested=True))
            here, mine = noted[1]
            off += [((x - y).abs().max() / y.abs().max()).item() for x, y in zip(here, there, strict=True)]
            assert mine.counts == told.counts
            other += not same(mine, told)
        handle.unpatch()
    most, apart = ROUNDED[model, name]
    assert max(off) < apart
    assert 0 < other <= most
    record_property("worst", agree(found, wanted))
    record_property("chosen_otherwise", other)


def noting(noted, told=None):
    """For `deciding`: notes what is seen and decided, and goes on with that, or with what it is `told`."""

    def wrap(own):
        def reduce(seen, layout):
            noted.append((list(seen.values()), own(seen, layout)))
            return noted[-1][1] if told is None else told

        return reduce

    return wrap


def same(one, other):
    """Whether the same patches stay, and the others flow into the same."""
    alike = torch.equal(one.keep, other.keep)
    return alike and (one.merge is None or torch.equal(one.merge.into, other.merge.into))


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
