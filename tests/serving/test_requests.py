"""Several pictures, the same ones again, budgets of requests, text among them: batched and cached as vLLM likes."""

from __future__ import annotations

import numpy as np
import pytest
import serving_models
import torch
from serving_engine import Prompt, agree, clear, content_number, expected, questions, runner_of, several

from vlmprune import registry

pytestmark = pytest.mark.vllm

MODELS = {
    "scene-llava": ({"keep": 64}, 25, 0.5),
    "scene-llava-next": ({"keep": 128}, 0.1, 400),
    "scene-qwen": ({"keep": 24}, 0.4, 10),
}


MIXED = [
    *(("scene-llava", method) for method in ("divprune", "pool", "todre", "tome", "visionzip", "vtc_cls")),
    *(("scene-llava-next", method) for method in ("visionzip", "vtc_cls")),
    *(("scene-qwen", method) for method in ("fopru", "pool")),
]


@pytest.mark.parametrize(("model", "method"), MIXED)
def test_everything_mixed_in_one_engine(engines, model, method):
    options, second, third = MODELS[model]
    options = options | registry.find(method).served_with
    if method == "tome":  # at most half of the tokens can go in each of four layers
        second = 96
    engine = engines(model, method, **options)
    one, two = questions(model, 40), several(model, 12)
    prompts = [prompt.at(keep) for prompt, keep in zip(one, [None, second, third, 1.0] * 10, strict=True)]
    prompts += [prompt.at(keep) for prompt, keep in zip(two, [None, second, 1.0] * 4, strict=True)]
    prompts += [Prompt((), prompt.question) for prompt in one[:8]]
    wanted = expected(model, prompts, method, **options)
    agree(engine.ask(prompts), wanted)
    # again, from the caches, and in another order beside other pictures
    agree(engine.ask(prompts[::-1]), wanted[::-1])
    asked_anew = [Prompt(prompt.images, "is there a red circle ?", prompt.keep) for prompt in prompts]
    agree(engine.ask(asked_anew), expected(model, asked_anew, method, **options))


@pytest.mark.parametrize("asked", [False, True])
def test_a_prefill_that_ends_inside_a_picture(engines, asked):
    # positions of its tokens come chunk by chunk, and those of text behind it are known before; vLLM's runner for CPUs
    # does not ask for them, and others do
    prompts = questions("scene-qwen", 24) + several("scene-qwen", 12)
    few = {"max_num_batched_tokens": 48, "max_num_seqs": 4}
    engine, options = engines("scene-qwen", "fopru", keep=0.6, engine=few), {"keep": 0.6}
    wanted = expected("scene-qwen", prompts, "fopru", **options)
    assert max(answer.prompt for answer in wanted) > 2 * 48
    runner = runner_of(engine.llm)
    clear(engine.llm)
    runner.is_multimodal_pruning_enabled = asked
    try:
        agree(engine.ask(prompts), wanted)
        agree(engine.ask(prompts[::-1]), wanted[::-1])
    finally:
        runner.is_multimodal_pruning_enabled = False


def test_a_prompt_that_ends_with_a_picture_is_an_error_of_that_request_alone(engines):
    engine = engines("scene-qwen", "fopru", keep=24)
    prompts = questions("scene-qwen", 3)
    request = engine.request(prompts[0])
    ends = request["prompt_token_ids"].index(engine.inner.config.image_token_id) + 1
    with pytest.raises(ValueError, match="must go on behind its last picture"):
        engine.llm.generate([request | {"prompt_token_ids": request["prompt_token_ids"][:ends]}], use_tqdm=False)
    agree(engine.ask(prompts), expected("scene-qwen", prompts, "fopru", keep=24))


def test_videos_are_refused(engines):
    engine, ids = engines("scene-qwen", "fopru", keep=24), [1, 66, 68, 67, 9]
    frames = np.zeros((4, 32, 32, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="video"):
        engine.llm.generate([{"prompt_token_ids": ids, "multi_modal_data": {"video": frames}}], use_tqdm=False)


def test_several_pictures_of_onevision_have_crops_each(engines, tmp_path):
    # as vLLM packs them, and transformers where they are not in a list of their own
    folder = serving_models.save(tmp_path / "onevision", "onevision")
    prompts = serving_models.prompts(60, pictures=2)
    found = engines(folder, "fopru", keep=20).ask(prompts)
    agree(found, expected(folder, prompts, "fopru", nested=False, keep=20))


def test_the_picture_decides_what_random_keeps(engines):
    # on transformers the picture's number in its prompt is added to the seed; here a number made of its content
    prompts = questions("scene-llava")
    engine = engines("scene-llava", "random", keep=64, seed=3)
    found, wanted = engine.ask(prompts), []
    for prompt in prompts:
        seed = 3 + content_number(engine, prompt.images[0])
        wanted += expected("scene-llava", [prompt], "random", keep=64, seed=seed)
    agree(found, wanted)
    # beside others, and in both orders, a picture keeps what it keeps alone
    agree(engine.ask(prompts[:6]), found[:6])
    pairs, seen = several("scene-llava", 9), []
    rows = engine.inner.embed_multimodal
    engine.inner.embed_multimodal = lambda **kwargs: seen.extend(rows(**kwargs)) or seen[-len(kwargs["pixel_values"]) :]
    try:
        for prompt in pairs:
            clear(engine.llm)
            engine.ask([prompt])
    finally:
        del engine.inner.embed_multimodal
    assert len({tuple(row.flatten().tolist()) for row in seen}) == len(
        {p.tobytes() for prompt in pairs for p in prompt.images}
    )


@pytest.mark.parametrize("keep", [0, -3, 1.5, "x", True, [4], 0.0])
def test_a_wrong_budget_is_an_error_of_that_request_alone(engines, keep):
    engine = engines("scene-llava", "vtc_cls", keep=64)
    prompts = questions("scene-llava", 3)
    with pytest.raises(ValueError, match="vlmprune_keep="):
        engine.ask([prompts[0].at(keep)])
    agree(engine.ask(prompts), expected("scene-llava", prompts, "vtc_cls", keep=64))


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"vlmprune_kepp": 25}, "Did you mean 'vlmprune_keep'"),
        ({"do_resize": False, "do_center_crop": False}, "takes vlmprune_keep alone"),  # which would end the engine
        ({"vlmprune_keep": 25, "size": {"height": 32, "width": 32}}, "'size' among a request's mm_processor_kwargs"),
    ],
)
def test_requests_bring_a_budget_and_nothing_else(engines, kwargs, words):
    engine = engines("scene-llava", "vtc_cls", keep=64)
    prompts = questions("scene-llava", 2)
    with pytest.raises(ValueError, match=words):
        engine.llm.generate([engine.request(prompts[0]) | {"mm_processor_kwargs": kwargs}], use_tqdm=False)
    agree(engine.ask(prompts), expected("scene-llava", prompts, "vtc_cls", keep=64))


def test_surplus_rows_are_an_error(engines):
    # vLLM cuts them off without a word
    engine = engines("scene-llava", "vtc_cls", keep=64)
    side, note = engine.inner.config.vision_config.image_size, torch.tensor([[float("nan"), 0.0, 63.0, 0.0]])
    pixels = torch.zeros(1, 3, side, side)
    with pytest.raises(RuntimeError, match="64 tokens stay of a picture with 63 placeholders"):
        engine.inner.embed_multimodal(pixel_values=pixels, vlmprune_keep=note)
    with pytest.raises(RuntimeError, match="without what the front end notes"):
        engine.inner.embed_multimodal(pixel_values=pixels)


def test_the_tower_encodes_no_more_at_once_than_unpruned(engines):
    model = engines("scene-llava", "vtc_cls", keep=64).inner
    side = model.config.vision_config.image_size
    pixels = torch.randn(9, 3, side, side, generator=torch.Generator().manual_seed(0))
    note = torch.tensor([[float("nan"), 0.0, 64.0, 0.0]]).expand(9, -1)
    whole, batches = model.embed_multimodal(pixel_values=pixels, vlmprune_keep=note), []
    handle = model.vision_tower.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    before, model.most = model.most, 2 * 256 + 100
    try:
        parts = model.embed_multimodal(pixel_values=pixels, vlmprune_keep=note)
    finally:
        model.most = before
        handle.remove()
    assert batches == [2, 2, 2, 2, 1]
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_towers_batch_is_counted_in_what_it_encodes(engines):
    # of a long strip un-padding leaves little, and all of it was encoded
    model = engines("scene-llava-next", "fopru", keep=32).inner
    strip = (30, 400)
    grid = model.served.grid(strip)
    assert grid.encoded > 1.2 * grid.tokens
    before, model.most = model.most, 2 * grid.encoded
    try:
        assert model.parts([strip] * 5) == [slice(0, 2), slice(2, 4), slice(4, 5)]
        model.most = 2 * grid.encoded - 1  # and two would still fit by their tokens
        assert model.most > 2 * grid.tokens
        assert model.parts([strip] * 3) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    finally:
        model.most = before


def test_memory_is_measured_on_the_largest_picture_that_the_method_takes(engines, tmp_path):
    # on OneVision visionzip refuses pictures whose canvas is shrunk, which vLLM's own choice may be
    folder = serving_models.save(tmp_path / "onevision", "onevision")
    for method, shrunk in (("visionzip", False), ("fopru", True)):
        info = engines(folder, method, keep=8).llm.llm_engine.renderer.mm_processor.info
        taken = [one for one in info.candidates() if shrunk or info.served.grid(one).blend is None]
        size = info.get_image_size_with_most_features()
        encoded = info.served.grid((size.height, size.width)).encoded
        assert encoded == max(info.served.grid(one).encoded for one in taken)
        most = info.get_mm_max_tokens_per_item(seq_len=3072, mm_counts={"image": 1})
        assert most == {"image": max(map(info.served.kept, taken))}


def test_a_picture_that_a_method_refuses_is_an_error_of_that_request_alone(engines, tmp_path):
    folder = serving_models.save(tmp_path / "onevision", "onevision")
    engine = engines(folder, "visionzip", keep=8)
    large = next(p for p in serving_models.prompts(60) if p.images[0].size == serving_models.LARGE)
    with pytest.raises(ValueError, match="visionzip merges patches"):
        engine.ask([large])
    prompts = serving_models.prompts(3, shrunk=False)
    agree(engine.ask(prompts), expected(folder, prompts, "visionzip", keep=8))


def test_hashes_tell_settings_apart(engines):
    from vllm.multimodal.processing.inputs import ProcessorInputs

    prompt, found = questions("scene-llava", 1), []
    for options in ({"keep": 64}, {"keep": 64, "start_layer": 1}):
        engine = engines("scene-llava", "vtc_cls", **options)
        made = engine.llm.llm_engine.renderer.mm_processor
        items = made.info.parse_mm_data({"image": list(prompt[0].images)})
        found.append(made._get_mm_hashes(ProcessorInputs([1], items))["image"][0])
    assert found[0] != found[1]
