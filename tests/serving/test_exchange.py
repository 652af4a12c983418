"""Tests of the tests: an engine whose settings were exchanged is one that started with them."""

from __future__ import annotations

import pytest
import serving_engine
from serving_engine import agree, expected, questions, runner_of

from vlmprune import registry

pytestmark = pytest.mark.vllm

#: What is exchanged for what: one that adds a layer to the tower and one that merges in it, by each other; and where
#: positions travel with the rows.
PAIRS = [("scene-llava", "tome", "todre"), ("scene-llava", "todre", "tome"), ("scene-qwen", "pool", "fopru")]


BUDGETS = {"scene-llava": (64, 140), "scene-qwen": (12, 0.4)}


def settings(method, model="scene-llava"):
    return {"keep": BUDGETS[model][0], **registry.find(method).served_with}


@pytest.mark.parametrize(("model", "before", "method"), PAIRS)
def test_an_exchanged_engine_answers_as_one_that_started_so(engines, model, before, method):
    prompts = questions(model)
    prompts += [prompt.at(BUDGETS[model][1]) for prompt in prompts]
    fresh = engines(model, method, fresh=True, **settings(method, model)).ask(prompts)
    live = engines.llm
    others = engines(model, before, **settings(before, model)).ask(prompts)  # whose answers are in the caches
    assert all(one != other for one, other in zip(fresh, others, strict=True))
    engine = engines(model, method, **settings(method, model))
    assert engines.llm is live
    assert engine.ask(prompts) == fresh  # log-probabilities to the last bit


def test_front_end_and_model_have_the_new_settings_and_nothing_of_the_old(engines):
    def hooks(engine):
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in engine.inner.vision_tower.modules()), len(
            engine.inner.vision_tower.vision_model.encoder.layers
        )

    plain = hooks(engines("scene-llava", "random", keep=64))
    for method in ("tome", "todre"):
        assert hooks(engines("scene-llava", method, **settings(method))) != plain
    engine = engines("scene-llava", "random", keep=32)
    assert hooks(engine) == plain
    told = engine.inner.served.settings
    assert told == {"method": "random", "keep": 32}
    assert engine.llm.llm_engine.renderer.mm_processor.info.served.settings == told
    assert len(runner_of(engine.llm).encoder_cache) == 0


@pytest.mark.parametrize("left", ["model", "front end"])
def test_half_an_exchange_is_noticed(engines, monkeypatch, left):
    """Answers are compared closely enough to tell: both methods keep as many."""
    from vllm.multimodal import MULTIMODAL_REGISTRY

    prompts = questions("scene-llava")
    engine = engines("scene-llava", "vtc_cls", keep=64)
    if left == "model":
        runner = runner_of(engine.llm)
        held = dict(runner.compilation_config.static_forward_context)
        monkeypatch.setattr(runner, "load_model", lambda: runner.compilation_config.static_forward_context.update(held))
        method, keep = "grid", 64
    else:
        old = engine.llm.llm_engine.renderer.mm_processor
        monkeypatch.setattr(MULTIMODAL_REGISTRY, "create_processor", lambda *args, **kwargs: old)
        method, keep = "grid", 32
    try:
        engine = engines("scene-llava", method, keep=keep)
        with pytest.raises((AssertionError, RuntimeError)):
            agree(engine.ask(prompts), expected("scene-llava", prompts, method, keep=keep))
        if left == "model":  # and nothing else is wrong with it: it answers as before
            agree(engine.ask(prompts), expected("scene-llava", prompts, "vtc_cls", keep=64))
    finally:
        engines.stop()


def test_an_engine_of_several_processes_or_compiled_is_not_exchanged():
    assert serving_engine.can_exchange("vtc_cls", None)
    assert serving_engine.can_exchange("vtc_cls", {"max_num_batched_tokens": 48})
    assert not serving_engine.can_exchange("vtc_cls", {"enforce_eager": False})
    assert not serving_engine.can_exchange("vtc_cls", {"distributed_executor_backend": "mp"})
    assert not serving_engine.can_exchange(None, None)
