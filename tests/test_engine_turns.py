"""Conversations that go on with new images: both turns on one cache equal their pruned sequence run by hand."""

from __future__ import annotations

import copy

import probes
import pytest
import reference
import tiny
import torch
import transformers.generation.utils
from probes import far, same
from reference import Rule
from transformers import DynamicCache, StaticCache

import vlmprune
from vlmprune import UnsupportedError

F64 = torch.float64
RULES = {
    "0": [Rule(0)],
    "0-original": [Rule(0, positions="original")],
    "2": [Rule(2)],
    "2-original": [Rule(2, positions="original")],
    "several": [Rule(0, 2), Rule(2, 5, 3, positions="original"), Rule(3, 4, 3)],
    "merge": [Rule(1, merge=True)],
}
FEW = {name: RULES[name] for name in ("0", "2-original", "several")}
MODELS = {
    "llama": {},
    "next": {"family": "llava_next"},
    "mistral-window": {"text": "mistral", "sliding_window": 9},
    "qwen2-mixed": {"text": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
}
TURNS = [([3, "image", 6], [(24, 24)]), ([2, "image", 1, "image", 4], [(40, 24), (24, 60)]), (["image", 5], [(24, 60)])]


def turns_of(model, parts=TURNS):
    return [tiny.prompt(model, p, sizes, seed) for seed, (p, sizes) in enumerate(parts)]


def joined(turns, *, images=True):
    """Turns as one prompt; `images=False` has those of the last turn alone."""
    ids = torch.cat([turn["input_ids"] for turn in turns], 1)
    pictured = [turn for turn in (turns if images else turns[-1:]) if "pixel_values" in turn]
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if not pictured:
        return whole
    pixels = [turn["pixel_values"] for turn in pictured]
    if pixels[0].ndim == 5:
        views = max(x.shape[1] for x in pixels)
        pixels = [torch.cat((x, x.new_zeros(len(x), views - x.shape[1], *x.shape[2:])), 1) for x in pixels]
        whole["image_sizes"] = torch.cat([turn["image_sizes"] for turn in pictured])
    return whole | {"pixel_values": torch.cat(pixels)}


def count(turn):
    return len(turn.get("pixel_values", ()))


def expect(model, turns, rules, forced):
    """`rules`: for every turn its own."""
    steps = [(count(turn), mine) for turn, mine in zip(turns, rules, strict=True)]
    with torch.no_grad():
        return reference.run(model, joined(turns), [], forced[0].tolist(), turns=steps).logits


def moved(rules):
    """The same cuts with the other position policy in the first."""
    return [*reference.other_positions(rules[:1]), *rules[1:]]


def spoken(model, turn, cache, steps=2):
    """A turn through `generate`, with everything before it as the ids say; returns the turn with its answer."""
    out = model.generate(
        **turn, max_new_tokens=steps + 1, do_sample=False, past_key_values=cache, return_dict_in_generate=True,
        disable_compile=True,
    )  # fmt: skip
    # the last token that was said has not been read
    return out.sequences[:, turn["input_ids"].shape[1] : -1], out.past_key_values


def with_answer(turn, answer):
    ids = torch.cat((turn["input_ids"], answer), 1)
    return turn | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def caches(model, kind):
    text = model.config.text_config
    return DynamicCache(config=text) if kind == "dynamic" else StaticCache(config=text, max_cache_len=400)


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
        got = probes.generated_logits(model, asked, forced, past_key_values=cache, disable_compile=True)[0]
    done.append(turns[-1])
    same(got, expect(model, done, [rules] * 3, forced))
    assert handle.trace.prompt_length == turns[-1]["input_ids"].shape[1]
    assert handle.trace.sample == [0]
    # what a window has passed by cannot be seen any more
    for turn in [2] if "sliding_window" in options else range(3):
        for twin in (reference.wrong(rules), moved(rules)):
            each = [twin if i == turn else rules for i in range(3)]
            far(got, expect(model, done, each, forced))


@torch.no_grad()
def by_hand(model, turn, cache, before, **extra):
    """A turn by a call of the model, its new tokens alone; `before` columns are in the cache's conversation."""
    length = turn["input_ids"].shape[1]
    mask = torch.ones(1, before + length, dtype=torch.long)
    return model(**(turn | {"attention_mask": mask} | extra), past_key_values=cache, use_cache=True)


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


# Turns that differ in what is done to them


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
                got = probes.generated_logits(model, asked, forced, past_key_values=cache)[0]
        else:
            got = probes.generated_logits(model, asked, forced, past_key_values=cache)[0]
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
            got = probes.generated_logits(model, asked, forced, past_key_values=cache)[0]
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
            got = probes.generated_logits(model, asked, forced, past_key_values=cache)[0]
            cache.crop(-3)
        kept = copy.deepcopy(cache)
        same(got, expect(model, turns[:2], [rules] * 2, forced))
        for going in (cache, kept):
            asked = joined(turns, images=False)
            got = probes.generated_logits(model, asked, forced, past_key_values=going)[0]
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
                model(**probes.step_inputs(prompt), past_key_values=cache)
                cache.crop(-gone)
                got, start = [], 0
                for some in (step, 6 - step):  # the second call is behind what was cropped
                    mask = torch.cat(
                        (prompt["attention_mask"][:, : width - gone], torch.ones(len(rows), start + some).long()), 1
                    )
                    positions = torch.tensor(lengths)[:, None] - gone + torch.arange(start, start + some)
                    extra = {"attention_mask": mask} if told == "mask" else {}
                    out = model(
                        input_ids=new[:, start : start + some], position_ids=positions, past_key_values=cache, **extra
                    )
                    got.append(out.logits)
                    start += some
                for i, row in enumerate(rows):
                    ids = row["input_ids"][:, : lengths[i] - gone]
                    kept = row | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                    want = reference.run(model, kept, rules, new[i].tolist()).logits[1:]
                    same(torch.cat(got, 1)[i], want)


# Batches


ROWS = [  # what three prompts bring to three turns
    [([3, "image", 6], [(24, 24)]), ([2, "image", 4], [(40, 24)]), ([4], [])],
    [([9], []), (["image", 1, "image", 2], [(24, 60), (24, 24)]), (["image", 3], [(24, 24)])],
    [(["image", 2, "image", 4], [(40, 24), (24, 60)]), ([5], []), ([2, "image", 2], [(24, 60)])],
]


@torch.no_grad()
def converse(model, rows, kind, ways, forced):
    """Logits `(rows, 1 + forced, vocab)` behind the last turn of a batch, padded as `ways` says in every turn."""
    cache, ids, mask = caches(model, kind), None, None
    for turn, way in enumerate(ways):
        new = tiny.batch([row[turn] for row in rows], way)
        ids = new["input_ids"] if ids is None else torch.cat((ids, new["input_ids"]), 1)
        mask = new["attention_mask"] if mask is None else torch.cat((mask, new["attention_mask"]), 1)
        asked = new | {"input_ids": ids, "attention_mask": mask}
        last = turn == len(ways) - 1
        steps = forced if last else forced[:, :1]
        got = probes.generated_logits(model, asked, steps, past_key_values=cache, disable_compile=True)
        if not last:  # what was forced was read, what came behind it was not
            ids, mask = torch.cat((ids, steps), 1), torch.cat((mask, torch.ones_like(steps)), 1)
    return got


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("options", [MODELS["llama"], MODELS["next"]], ids=["llama", "next"])
def test_rows_of_a_batch_go_on_like_prompts_alone(tiny_model, options, rules, kind):
    model, forced = tiny_model(dtype=F64, **options), probes.random_tokens(3, 3)
    rows = [turns_of(model, parts) for parts in ROWS]
    with vlmprune.patch(model, probes.rules(*rules)):
        for turns in (2, 3):
            got = converse(model, rows, kind, ["left"] * turns, forced)
            for i, row in enumerate(rows):
                said = [with_answer(turn, forced[i : i + 1, :1]) for turn in row[: turns - 1]] + [row[turns - 1]]
                each = [rules] * turns
                same(got[i], expect(model, said, each, forced[i : i + 1]))
                wrong = [moved(rules) if count(turn) else rules for turn in row[:turns]]
                far(got[i], expect(model, said, wrong, forced[i : i + 1]))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("rules", FEW.values(), ids=FEW)
def test_rows_of_a_batch_go_on_with_text_of_different_lengths(tiny_model, rules, kind):
    """Padding inside a row, which the masks of a static cache's later steps do not reach."""
    model, forced = tiny_model(dtype=F64), probes.random_tokens(3, 3)
    rows = [turns_of(model, [parts[0], ([2 + 3 * i], []), parts[1]]) for i, parts in enumerate(ROWS)]
    with vlmprune.patch(model, probes.rules(*rules)):
        for turns in (2, 3):  # and then with images
            got = converse(model, rows, kind, ["left"] * turns, forced)
            for i, row in enumerate(rows):
                said = [with_answer(turn, forced[i : i + 1, :1]) for turn in row[: turns - 1]] + [row[turns - 1]]
                same(got[i], expect(model, said, [rules] * turns, forced[i : i + 1]))


def test_beams_of_a_second_turn(tiny_model):
    """The first turn leaves a row per beam in the cache, all of one prompt."""
    model, rules = tiny_model(dtype=F64), RULES["several"]
    first, second = turns_of(model)[:2]
    cache = caches(model, "dynamic")
    with vlmprune.patch(model, probes.rules(*rules)), torch.no_grad():
        model(**{k: v.repeat_interleave(2, 0) for k, v in first.items()}, past_key_values=cache)
        # `generate` hands pictures to beams by the placeholders that it is given: the new ones alone
        mask = joined([first, second])["attention_mask"]
        asked = second | {"attention_mask": mask}
        out = model.generate(
            **asked, num_beams=2, max_new_tokens=3, do_sample=False, past_key_values=cache, length_penalty=0.0,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
    tokens = out.sequences[0, asked["input_ids"].shape[1] :]
    for each, check in (([rules] * 2, same), ([rules, reference.wrong(rules)], far)):
        logits = expect(model, [first, second], each, tokens[None, :-1])
        check(out.sequences_scores.double(), logits.log_softmax(-1)[range(3), tokens].sum()[None], 1e-5)


# What cannot be is refused


def test_pictures_of_both_turns_are_refused_as_the_plain_model_refuses_them(tiny_model):
    model = tiny_model()
    first, second = turns_of(model)[:2]
    asked = joined([first, second])
    cache = model.generate(**first, max_new_tokens=1, return_dict_in_generate=True).past_key_values
    with pytest.raises(ValueError, match="do not match"):
        model.generate(**asked, max_new_tokens=1, past_key_values=cache)
    with vlmprune.patch(model, probes.rules(Rule(0))):
        cache = model.generate(**first, max_new_tokens=1, return_dict_in_generate=True).past_key_values
        with pytest.raises(ValueError, match=r"3 images were given.*placeholders for 2.*give the new images alone"):
            model.generate(**asked, max_new_tokens=1, past_key_values=cache)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("layer", [0, 2])
@torch.no_grad()
def test_a_cache_whose_rows_were_repeated_is_refused(tiny_model, layer, steps):
    model = tiny_model()
    prompt = tiny.batch([turns_of(model, [parts[0]])[0] for parts in ROWS[:2]])
    width = prompt["input_ids"].shape[1]
    with vlmprune.patch(model, probes.rules(Rule(layer))):
        cache = model(**prompt, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        with pytest.raises(UnsupportedError, match=r"filled by 2 rows.*brings 4.*Repeat the prompts"):
            model(
                input_ids=torch.full((4, steps), 9),
                attention_mask=torch.ones(4, width + steps).long(),
                past_key_values=cache,
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
        cache = model(**first).past_key_values
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
    for i, (first, second) in enumerate(alike):
        said = [with_answer(first, forced[i : i + 1, :1]), second]
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
        model.generate(**first, max_new_tokens=1, past_key_values=cache, disable_compile=True)
        with pytest.raises(UnsupportedError, match="whole conversation"):
            model.generate(
                **(second | {"attention_mask": mask}), max_new_tokens=1, past_key_values=cache, disable_compile=True
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
        model.generate(**first, max_new_tokens=1, past_key_values=cache)
        going = {"past_key_values": cache, "prefill_chunk_size": size}
        if size == 5:
            with pytest.raises(UnsupportedError, match=r"prefill_chunk_size.*11 tokens"):
                probes.generated_logits(model, asked, forced, **going)
            return
        got = probes.generated_logits(model, asked, forced, **going)[0, -4:]
    same(got, expect(model, [first, second], [[Rule(0)]] * 2, forced))
