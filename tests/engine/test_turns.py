"""Conversations that go on with new images: both turns on one cache equal their pruned sequence run by hand."""

from __future__ import annotations

import copy

import probes
import pytest
import reference
import tiny
import torch
from conversations import (
    FEW,
    MODELS,
    RULES,
    TURNS,
    by_hand,
    caches,
    count,
    expect,
    joined,
    moved,
    turns_of,
    with_answer,
)
from probes import far, same
from tiny import CACHE

import vlmprune

F64 = torch.float64


def spoken(model, turn, cache, steps=2):
    """A turn through `generate`, with everything before it as the ids say; returns the turn with its answer."""
    out = model.generate(
        **turn, max_new_tokens=steps + 1, do_sample=False, **{CACHE: cache}, return_dict_in_generate=True,
        disable_compile=True,
    )  # fmt: skip
    # the last token that was said has not been read
    return out.sequences[:, turn["input_ids"].shape[1] : -1], out[CACHE]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_generate_goes_on_with_new_images(tiny_model, options, rules, kind):
    """Three turns; `generate` gets all ids and the pictures of the new turn."""
    model, forced = tiny_model(dtype=F64, **options), probes.random_tokens(1, 3)
    turns, cache, done = turns_of(model), caches(model, kind), []
    with vlmprune.patch(model, probes.rules(*rules)) as handle:
        for turn in turns[:-1]:
            answer, cache = spoken(model, joined([*done, turn], images=False), cache)
            done.append(with_answer(turn, answer))
        asked = joined([*done, turns[-1]], images=False)
        got = probes.generated_logits(model, asked, forced, **{CACHE: cache}, disable_compile=True)[0]
    done.append(turns[-1])
    same(got, expect(model, done, [rules] * 3, forced))
    assert handle.trace.prompt_length == turns[-1]["input_ids"].shape[1]
    assert handle.trace.sample == [0]
    # what a window has passed by cannot be seen any more
    for turn in [2] if "sliding_window" in options else range(3):
        for twin in (reference.wrong(rules), moved(rules)):
            each = [twin if i == turn else rules for i in range(3)]
            far(got, expect(model, done, each, forced))


@pytest.mark.parametrize("told", ["mask", "positions", "nothing"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_calls_by_hand_go_on_with_new_images(tiny_model, rules, kind, told):
    model = tiny_model(dtype=F64)
    turns, cache, before, outputs = turns_of(model), caches(model, kind), 0, []
    with vlmprune.patch(model, probes.rules(*rules)) as handle:
        for turn in turns:
            length = turn["input_ids"].shape[1]
            extra = {} if told == "mask" else {"attention_mask": None}
            if told == "positions":
                extra["position_ids"] = torch.arange(before, before + length)[None]
            outputs.append(by_hand(model, turn, cache, before, output_hidden_states=True, **extra))
            before += length
        trace = handle.trace
    for i, out in enumerate(outputs):
        assert out.logits.shape[1] == turns[i]["input_ids"].shape[1]
        assert all(h.shape[1] == out.logits.shape[1] for h in out.hidden_states)
        same(out.logits[0, -1:], expect(model, turns[: i + 1], [rules] * (i + 1), torch.zeros(1, 0)))
        far(
            out.logits[0, -1:], expect(model, turns[: i + 1], [*[rules] * i, reference.wrong(rules)], torch.zeros(1, 0))
        )
    with torch.no_grad():
        alone, all_but_last = (
            reference.run(model, joined(some), [], turns=[(count(turn), rules) for turn in some])
            for some in (turns, turns[:-1])
        )
    assert trace.kv_lengths == [a - b for a, b in zip(alone.kv_lengths, all_but_last.kv_lengths, strict=True)]
    assert [cache.get_seq_length(layer) for layer in range(tiny.LAYERS)] == alone.kv_lengths


@pytest.mark.parametrize("order", ["plain first", "plain last", "between"])
@pytest.mark.parametrize("rules", FEW.values(), ids=FEW)
@pytest.mark.parametrize("options", [MODELS["llama"], MODELS["qwen2-mixed"]], ids=["llama", "qwen2-mixed"])
def test_plain_turns_and_pruned_turns_share_a_cache(tiny_model, options, rules, order):
    model, forced = tiny_model(dtype=F64, **options), probes.random_tokens(1, 3)
    turns, cache, done = turns_of(model), caches(model, "dynamic"), []
    plain = {"plain first": [0], "plain last": [2], "between": [1]}[order]
    each = [[] if i in plain else rules for i in range(3)]
    handle = vlmprune.patch(model, probes.rules(*rules))
    for i, turn in enumerate(turns):
        asked = joined([*done, turn], images=False)
        if i in plain:
            with handle.disabled():
                got = probes.generated_logits(model, asked, forced, **{CACHE: cache})[0]
        else:
            got = probes.generated_logits(model, asked, forced, **{CACHE: cache})[0]
        # the last logits come with one token more than was forced
        same(got, expect(model, [*done, turn], each[: i + 1], forced))
        done.append(with_answer(turn, forced))
    if not options:
        far(got, expect(model, [*done[:-1], turns[-1]], [rules] * 3, forced))


@pytest.mark.parametrize("first", RULES.values(), ids=RULES)
def test_every_turn_may_be_pruned_by_another_patch(tiny_model, first):
    model = tiny_model(dtype=F64)
    each = [first, RULES["2"], RULES["0-original"]]
    turns, cache, before = turns_of(model), caches(model, "dynamic"), 0
    for turn, rules in zip(turns, each, strict=True):
        vlmprune.patch(model, probes.rules(*rules))
        out = by_hand(model, turn, cache, before)
        before += turn["input_ids"].shape[1]
    same(out.logits[0, -1:], expect(model, turns, each, torch.zeros(1, 0)))
    far(out.logits[0, -1:], expect(model, turns, each[1:] + each[:1], torch.zeros(1, 0)))


@pytest.mark.parametrize("rules", FEW.values(), ids=FEW)
def test_text_before_and_between_pictures(tiny_model, rules):
    model, forced = tiny_model(dtype=F64), probes.random_tokens(1, 3)
    turns = turns_of(model, [([7], []), TURNS[0], ([4], []), TURNS[1], ([6], [])])
    cache, done = caches(model, "dynamic"), []
    with vlmprune.patch(model, probes.rules(*rules)):
        for turn in turns:
            asked = joined([*done, turn], images=False)
            got = probes.generated_logits(model, asked, forced, **{CACHE: cache})[0]
            same(got, expect(model, [*done, turn], [rules] * (len(done) + 1), forced))
            done.append(with_answer(turn, forced))


@pytest.mark.parametrize("rules", FEW.values(), ids=FEW)
def test_a_conversation_that_was_rolled_back_goes_on(tiny_model, rules):
    """Tokens that are cropped off again, and a turn that is asked anew on a copy of the cache."""
    model, forced = tiny_model(dtype=F64), probes.random_tokens(1, 3)
    turns, cache = turns_of(model), caches(model, "dynamic")
    with vlmprune.patch(model, probes.rules(*rules)):
        for kind in ("first", "second"):
            asked = turns[0] if kind == "first" else joined(turns[:2], images=False)
            got = probes.generated_logits(model, asked, forced, **{CACHE: cache})[0]
            cache.crop(-3)
        kept = copy.deepcopy(cache)
        same(got, expect(model, turns[:2], [rules] * 2, forced))
        for going in (cache, kept):
            asked = joined(turns, images=False)
            got = probes.generated_logits(model, asked, forced, **{CACHE: going})[0]
            same(got, expect(model, turns, [rules] * 3, forced))


@pytest.mark.parametrize(
    ("batched", "told"), [(False, "mask"), (False, "positions"), (True, "mask")], ids=["mask", "positions", "batch"]
)
@pytest.mark.parametrize("rules", FEW.values(), ids=FEW)
@torch.no_grad()
def test_text_behind_a_prompt_that_was_rolled_back(tiny_model, rules, batched, told):
    """The last text of the prompt goes, and other tokens take its place."""
    model = tiny_model(dtype=F64)
    rows = [turns_of(model, [parts])[0] for parts in (TURNS[0], ([3, "image", 8], [(24, 24)]))]
    rows = rows if batched else rows[1:]
    prompt = tiny.batch(rows, "left")
    lengths, width = [row["input_ids"].shape[1] for row in rows], prompt["input_ids"].shape[1]
    new = probes.random_tokens(len(rows), 6, seed=3)
    with vlmprune.patch(model, probes.rules(*rules)):
        for gone in (1, 2, 3):
            for step in (1, 2, 4):
                cache = caches(model, "dynamic")
                model(**probes.step_inputs(prompt), **{CACHE: cache})
                cache.crop(-gone)
                got, start = [], 0
                for some in (step, 6 - step):  # the second call is behind what was cropped
                    mask = torch.cat(
                        (prompt["attention_mask"][:, : width - gone], torch.ones(len(rows), start + some).long()), 1
                    )
                    positions = torch.tensor(lengths)[:, None] - gone + torch.arange(start, start + some)
                    extra = {"attention_mask": mask} if told == "mask" else {}
                    out = model(
                        input_ids=new[:, start : start + some], position_ids=positions, **{CACHE: cache}, **extra
                    )
                    got.append(out.logits)
                    start += some
                for i, row in enumerate(rows):
                    ids = row["input_ids"][:, : lengths[i] - gone]
                    kept = row | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                    want = reference.run(model, kept, rules, new[i].tolist()).logits[1:]
                    same(torch.cat(got, 1)[i], want)
