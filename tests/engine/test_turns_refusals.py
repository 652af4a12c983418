"""Turns that a cache cannot go on with: refused, with what to do instead; what is like them and can be, goes on."""

from __future__ import annotations

import probes
import pytest
import tiny
import torch
import transformers.generation.utils
from conversations import (
    MODELS,
    ROWS,
    RULES,
    TURNS,
    answered,
    by_hand,
    caches,
    converse,
    expect,
    joined,
    turns_of,
)
from probes import same
from reference import Rule
from tiny import CACHE

import vlmprune
from vlmprune import UnsupportedError

F64 = torch.float64


def test_pictures_of_both_turns_are_refused_as_the_plain_model_refuses_them(tiny_model):
    model = tiny_model()
    first, second = turns_of(model)[:2]
    asked = joined([first, second])
    cache = model.generate(**first, max_new_tokens=1, return_dict_in_generate=True)[CACHE]
    with pytest.raises(ValueError, match="do not match"):
        model.generate(**asked, max_new_tokens=1, **{CACHE: cache})
    with vlmprune.patch(model, probes.rules(Rule(0))):
        cache = model.generate(**first, max_new_tokens=1, return_dict_in_generate=True)[CACHE]
        with pytest.raises(ValueError, match=r"3 images were given.*placeholders for 2.*give the new images alone"):
            model.generate(**asked, max_new_tokens=1, **{CACHE: cache})


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("layer", [0, 2])
@torch.no_grad()
def test_a_cache_whose_rows_were_repeated_is_refused(tiny_model, layer, steps):
    model = tiny_model()
    prompt = tiny.batch([turns_of(model, [parts[0]])[0] for parts in ROWS[:2]])
    width = prompt["input_ids"].shape[1]
    with vlmprune.patch(model, probes.rules(Rule(layer))):
        cache = model(**prompt, use_cache=True)[CACHE]
        cache.batch_repeat_interleave(2)
        with pytest.raises(UnsupportedError, match=r"filled by 2 rows.*brings 4.*Repeat the prompts"):
            model(
                input_ids=torch.full((4, steps), 9),
                attention_mask=torch.ones(4, width + steps).long(),
                **{CACHE: cache},
            )


@pytest.mark.parametrize("told", ["mask", "positions"])
@pytest.mark.parametrize("pictured", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_call_that_ends_elsewhere_than_the_conversation(tiny_model, layer, pictured, told):
    """Whatever it is, tokens would be there twice, or be missing."""
    model = tiny_model()
    first, second = turns_of(model, [TURNS[0], TURNS[1] if pictured else ([7], [])])
    old, new = (turn["input_ids"].shape[1] for turn in (first, second))
    with torch.no_grad(), vlmprune.patch(model, probes.rules(Rule(layer))):
        cache = model(**first)[CACHE]
        for end in (old, old + new - 1, old + new + 1):
            extra = {"attention_mask": torch.ones(1, end, dtype=torch.long)}
            if told == "positions":
                extra = {"attention_mask": None, "position_ids": torch.arange(end - new, end)[None]}
            with pytest.raises(ValueError, match=rf"at column {end};.*stands for {old} .*brings {new}.*{old + new}"):
                by_hand(model, second, cache, 0, **extra)
        by_hand(model, second, cache, old)


@pytest.mark.parametrize("options", [MODELS["mistral-window"], MODELS["qwen2-mixed"]], ids=["mistral", "qwen2-mixed"])
def test_padding_inside_the_rows_of_a_sliding_window(tiny_model, options):
    model, forced = tiny_model(dtype=F64, **options), probes.random_tokens(3, 3)
    rows = [turns_of(model, parts) for parts in ROWS]
    with vlmprune.patch(model, probes.rules(*RULES["several"])):
        with pytest.raises(UnsupportedError, match=r"padding inside a row.*one by one"):
            converse(model, rows, "dynamic", ["left"] * 2, forced)
        # rows that bring as many tokens and keep as many go on together
        alike = [[turns_of(model, [parts[0]])[0], turns_of(model, [TURNS[0]])[0]] for parts in ROWS]
        got = converse(model, alike, "dynamic", ["left"] * 2, forced)
    for i, row in enumerate(alike):
        said = answered(row, forced[i : i + 1, :1])
        same(got[i], expect(model, said, [RULES["several"]] * 2, forced[i : i + 1]))


def test_a_padded_batch_on_a_static_cache_with_a_sliding_window(tiny_model):
    model, forced = tiny_model(dtype=F64, **MODELS["mistral-window"]), probes.random_tokens(3, 3)
    rows = [turns_of(model, parts) for parts in ROWS]
    with (
        vlmprune.patch(model, probes.rules(*RULES["several"])),
        pytest.raises(UnsupportedError, match=r"static cache with a sliding window.*dynamic cache"),
    ):
        converse(model, rows, "static", ["left"] * 2, forced)


def test_new_tokens_alone_in_a_batch_on_a_static_cache(tiny_model):
    model = tiny_model(dtype=F64)
    rows = [turns_of(model, parts) for parts in ROWS]
    first, second = (tiny.batch([row[turn] for row in rows]) for turn in range(2))
    mask = torch.cat((first["attention_mask"], second["attention_mask"]), 1)
    with vlmprune.patch(model, probes.rules(Rule(0))):
        cache = caches(model, "static")
        model.generate(**first, max_new_tokens=1, **{CACHE: cache}, disable_compile=True)
        with pytest.raises(UnsupportedError, match="whole conversation"):
            model.generate(
                **(second | {"attention_mask": mask}), max_new_tokens=1, **{CACHE: cache}, disable_compile=True
            )


@pytest.mark.skipif(
    not hasattr(transformers.generation.utils, "_slice_mm_encoder_output"),
    reason="this transformers reads the whole conversation again, pruned or not, when it reads it in pieces",
)
@pytest.mark.parametrize("size", [5, 30])
def test_a_text_turn_in_pieces_is_right_or_refused(tiny_model, size):
    """The first piece comes again, since the cache is shorter than what it stands for."""
    model, forced = tiny_model(dtype=F64), probes.random_tokens(1, 3)
    first, second = turns_of(model, [TURNS[0], ([40], [])])
    asked, cache = joined([first, second], images=False), caches(model, "dynamic")
    with vlmprune.patch(model, probes.rules(Rule(0))):
        model.generate(**first, max_new_tokens=1, **{CACHE: cache})
        going = {CACHE: cache, "prefill_chunk_size": size}
        if size == 5:
            with pytest.raises(UnsupportedError, match=r"prefill_chunk_size.*11 tokens"):
                probes.generated_logits(model, asked, forced, **going)
            return
        got = probes.generated_logits(model, asked, forced, **going)[0, -4:]
    same(got, expect(model, [first, second], [[Rule(0)]] * 2, forced))
