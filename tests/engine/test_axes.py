"""Positions on three axes (M-RoPE): kept as they were, and where a conversation goes on is kept with its cache."""

from __future__ import annotations

import copy

import conversations
import pytest
import reference
import tiny
import tiny_qwen
import torch
from probes import far, generated_logits, random_tokens, rules, same
from scenes import QWEN, Scene, replay
from tiny import CACHE
from transformers import DynamicCache
from waits import reads

import vlmprune
from vlmprune import UnsupportedError

F64 = torch.float64
FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"]
CUTS = reference.ON_AXES
STEPS = 5
family = pytest.mark.parametrize("family", FAMILIES)


def shared(family, **options):
    return tiny.shared(family=family, dtype=F64, **options)


def prompt_of(model, seed=0):
    return tiny.prompt(model, [4, "image", 3, "image", 5], [(40, 24), (20, 70)], seed)


@torch.no_grad()
def stepped(model, inputs, forced, way):
    """Logits behind a prompt and behind every forced token, `(1 + forced, vocab)`, called step by step."""
    out = model(**inputs, use_cache=True)
    logits, cache, length = [out.logits[0, -1]], out[CACHE], inputs["input_ids"].shape[1]
    for step, token in enumerate(forced[0].tolist()):
        told = {
            "bare": {},
            "mask": {"attention_mask": torch.ones(1, length + step + 1, dtype=torch.long)},
            # as `generate` hands them on: the count, and what the host's own note made of it, here of nothing
            "counted": {"position_ids": torch.tensor([length + step, 0, 0, 0])[:, None, None]},
        }[way]
        out = model(input_ids=torch.tensor([[token]]), **told, **{CACHE: cache}, use_cache=True)
        logits.append(out.logits[0, -1])
    return torch.stack(logits)


@family
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_a_cut_anywhere_is_what_it_is_by_hand(family, cuts):
    """Below, at and above the layers behind which features are added; with what is decoded behind it."""
    model, forced = shared(family), random_tokens(1, STEPS)
    prompt = prompt_of(model)
    with torch.no_grad():
        want = reference.run(model, prompt, cuts, forced[0].tolist())
        other = reference.run(model, prompt, reference.wrong(cuts), forced[0].tolist())
    with vlmprune.patch(model, rules(*cuts)) as handle:
        for way in ("bare", "mask", "counted"):
            same(stepped(model, prompt, forced, way), want.logits)
        same(generated_logits(model, prompt, forced)[0], want.logits)
        assert handle.trace.kv_lengths == want.kv_lengths
        with torch.no_grad():
            out = model(**prompt, output_hidden_states=True)
        length = prompt["input_ids"].shape[1]
        alone = reference.run(model, prompt, cuts)
        same(out.hidden_states[-1][0], alone.at_prompt_length(alone.hidden, length))
    if cuts[0].rest:
        far(want.logits, other.logits)


@family
def test_a_static_cache(family):
    model, forced = shared(family), random_tokens(1, STEPS)
    prompt = prompt_of(model)
    for name in ("0", "2", "several"):
        with torch.no_grad():
            want = reference.run(model, prompt, CUTS[name], forced[0].tolist()).logits
        with vlmprune.patch(model, rules(*CUTS[name])):
            same(generated_logits(model, prompt, forced, cache_implementation="static", disable_compile=True)[0], want)


@family
def test_a_budget_of_everything_is_the_model_itself(family):
    model = shared(family)
    prompt, forced = prompt_of(model), random_tokens(1, 3)
    with torch.no_grad():
        plain, answer = model(**prompt, output_hidden_states=True), generated_logits(model, prompt, forced)
        with vlmprune.patch(model, "random", keep=1.0):
            out = model(**prompt, output_hidden_states=True)
            assert torch.equal(generated_logits(model, prompt, forced), answer)
    assert torch.equal(out.logits, plain.logits)
    assert all(torch.equal(a, b) for a, b in zip(out.hidden_states, plain.hidden_states, strict=True))


@family
@pytest.mark.parametrize("keep", [0.4, 1.0])
def test_two_conversations_take_turns_on_one_model(family, keep):
    """The host notes on the model where a conversation goes on, and the other one overwrites it."""
    model, token = shared(family), torch.tensor([[9]])
    first, second = prompt_of(model), tiny.prompt(model, [2, "image", 2], [(90, 96)], 1)

    @torch.no_grad()
    def talked(between):
        out = model(**first, use_cache=True)
        if between:
            model(**second, use_cache=True)
        return model(input_ids=token, **{CACHE: out[CACHE]}, use_cache=True).logits

    far(talked(True), talked(False))  # unpruned, which is why
    with vlmprune.patch(model, "random", keep=keep):
        assert torch.equal(talked(True), talked(False))


@family
@pytest.mark.parametrize("parts", [["image"], ["image", 3], [3, "image"]], ids=str)
def test_prompts_of_hardly_anything_but_a_picture(family, parts):
    model, forced = shared(family), random_tokens(1, 4)
    prompt = tiny.prompt(model, parts, [(40, 24)])
    for name in ("0", "2", "nothing left"):
        if name == "nothing left" and len(parts) == 1:
            continue
        with torch.no_grad():
            want = reference.run(model, prompt, CUTS[name], forced[0].tolist()).logits
        if parts[-1] == "image":  # its last column may be gone: what is read there is then that of the last kept one
            want = want[1:]
        with vlmprune.patch(model, rules(*CUTS[name])):
            same(stepped(model, prompt, forced, "bare")[-len(want) :], want)


def test_a_video_may_reach_beyond_the_text_behind_it_in_time():
    scene = Scene(*QWEN["qwen2.5-vl-video"])
    model = scene.model
    prompt = tiny.prompt(model, [2, "video", 1], [], videos=[6])
    place = reference.places(model, prompt)
    assert place[0].max() > place[0, -1]
    with torch.no_grad(), vlmprune.patch(model, "random", keep=0.4) as handle:
        got = stepped(model, prompt, torch.tensor([[9, 33, 21]]), "bare")
        features = [], reference.video_features(model, prompt)
    with torch.no_grad():
        same(got, replay(model, prompt, features, handle.trace)[0])
        far(got, replay(model, prompt, features, handle.trace, positions="counted")[0])


# -- later turns


def told(turns, model):
    """The text of several turns, as the last of them brings it."""
    ids = torch.cat([turn["input_ids"] for turn in turns], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@family
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["0", "2", "several"])
@pytest.mark.parametrize("more", ["nothing", "types", "types and grids"])
def test_a_later_turn_of_text(family, kind, name, more):
    """Through `generate`, with what a chat template's user may hand on; another conversation was held in between."""
    model, cuts = shared(family), CUTS[name]
    first, answer, forced = prompt_of(model), random_tokens(1, 2, 1), random_tokens(1, 4, 2)
    then = conversations.with_answer(first, answer)
    second = tiny.prompt(model, [6], [], 3)
    turns = [then, second]
    want = conversations.expect(model, turns, [cuts, []], forced)
    with vlmprune.patch(model, rules(*cuts)):
        cache = conversations.caches(model, kind)
        generated_logits(model, first, answer, **{CACHE: cache}, disable_compile=True)
        generated_logits(model, tiny.prompt(model, [2, "image", 2], [(90, 96)], 1), answer)
        asked = told(turns, model)
        if more != "nothing":
            asked["mm_token_type_ids"] = tiny_qwen.types(asked["input_ids"])
        if more == "types and grids":
            asked["image_grid_thw"] = first["image_grid_thw"]
        same(generated_logits(model, asked, forced, **{CACHE: cache}, disable_compile=True)[0], want)


@family
@pytest.mark.parametrize("name", ["0", "2", "several"])
def test_new_pictures_in_a_later_turn(family, name):
    """By calls of the model with the new tokens alone, and through `generate`, which is not told what is a picture."""
    model, cuts = shared(family), CUTS[name]
    turns, forced = conversations.turns_of(model), random_tokens(1, 4)
    want = conversations.expect(model, turns, [cuts] * 3, forced)
    with torch.no_grad(), vlmprune.patch(model, rules(*cuts)):
        cache, before = DynamicCache(config=model.config.text_config), 0
        for turn in turns:
            out = conversations.by_hand(model, turn, cache, before)
            before += turn["input_ids"].shape[1]
        logits = [out.logits[0, -1]]
        for token in forced[0].tolist():
            out = model(input_ids=torch.tensor([[token]]), **{CACHE: cache}, use_cache=True)
            logits.append(out.logits[0, -1])
        same(torch.stack(logits), want)
        cache = DynamicCache(config=model.config.text_config)
        said = []
        for number, turn in enumerate(turns):
            said.append(conversations.with_answer(turn, forced[:, :1]) if number < 2 else turn)
            asked = turn | told([*said[:-1], turn], model)
            if number:
                del asked["mm_token_type_ids"]
            steps = forced if number == 2 else forced[:, :1]
            got = generated_logits(model, asked, steps, **{CACHE: cache}, disable_compile=True)
    same(got[0], conversations.expect(model, said, [cuts] * 3, forced))


@family
def test_a_padded_batch_goes_on(family):
    """Rows of other lengths and pictures, a second turn of text in each; positions are those of each row alone."""
    model, forced = shared(family), random_tokens(3, 3)
    rows = [
        [tiny.prompt(model, [3, "image", 4], [(40, 24)], 0), tiny.prompt(model, [5], [], 5)],
        [tiny.prompt(model, [6], [], 1), tiny.prompt(model, [2], [], 6)],
        [tiny.prompt(model, ["image", 1, "image", 9], [(20, 70), (24, 24)], 2), tiny.prompt(model, [3], [], 7)],
    ]
    for name in ("0", "several"):
        with vlmprune.patch(model, rules(*CUTS[name])):
            got = conversations.converse(model, rows, "dynamic", ["left", "left"], forced)
            for row, turns in enumerate(rows):
                mine = [conversations.with_answer(turns[0], forced[row : row + 1, :1]), turns[1]]
                want = conversations.expect(model, mine, [CUTS[name], []], forced[row : row + 1])
                same(got[row], want)


# -- refused by name


def fails(match):
    return pytest.raises(UnsupportedError, match=match)


@family
def test_positions_that_would_close_gaps_are_refused(family):
    with fails("positions='contiguous' closes the gaps .* lie on 3 axes"):
        vlmprune.patch(shared(family), "random", keep=4, positions="contiguous")
    with vlmprune.patch(shared(family), "random", keep=0.4) as handle, torch.no_grad():
        shared(family)(**prompt_of(shared(family)))
        assert handle.trace.cuts[0].positions == "original"


@family
@pytest.mark.parametrize("name", ["mm_token_type_ids", "image_grid_thw"])
def test_a_call_without_what_positions_are_made_of(family, name):
    """The host counts pictures as text then, and most say nothing."""
    model = shared(family)
    prompt = {key: value for key, value in prompt_of(model).items() if key != name}
    with vlmprune.patch(model, "random", keep=0.4), torch.no_grad(), fails(name):
        model(**prompt)
    if name == "mm_token_type_ids":
        with vlmprune.patch(model, "random", keep=0.4), fails("the positions of this call count pictures as text"):
            model.generate(**prompt, max_new_tokens=2)


@family
def test_positions_and_types_that_count_pictures_as_text(family):
    model = shared(family)
    prompt, length = prompt_of(model), prompt_of(model)["input_ids"].shape[1]
    count = torch.arange(length)[None]
    with vlmprune.patch(model, "random", keep=0.4), torch.no_grad():
        with fails("position_ids of shape .* count pictures as text"):
            model(**prompt, position_ids=count)
        with fails("the positions of this call count pictures as text"):
            model(**prompt, position_ids=count.expand(3, 1, -1))
        with fails("the positions of this call count pictures as text"):
            model(**prompt | {"mm_token_type_ids": torch.zeros_like(prompt["mm_token_type_ids"])})
        place = reference.places(model, prompt)[:, None]
        same(model(**prompt, position_ids=place).logits, model(**prompt).logits)


@family
def test_a_picture_of_one_token_stands_where_a_word_would(family):
    model = shared(family)
    prompt = tiny.prompt(model, [3, "image", 2], [(8, 8)])
    del prompt["mm_token_type_ids"]
    with vlmprune.patch(model, "random", keep=1), torch.no_grad():
        assert model.generate(**prompt, max_new_tokens=2).shape == (1, 8)


@family
def test_pictures_behind_a_cache_that_the_patch_did_not_fill(family):
    model = shared(family)
    text, turn = tiny.prompt(model, [5], [], 1), tiny.prompt(model, [2, "image", 4], [(40, 24)])
    both = conversations.joined([text, turn])
    with torch.no_grad(), vlmprune.patch(model, rules(*CUTS["2"])):
        cache = model(input_ids=text["input_ids"], use_cache=True)[CACHE]
        with fails("pictures behind a cache that this patch did not fill"):
            model(**turn | {"attention_mask": both["attention_mask"]}, **{CACHE: cache})
        place = reference.places(model, both)[:, None, 5:]
        got = model(**turn | {"attention_mask": both["attention_mask"]}, position_ids=place, **{CACHE: cache}).logits
        same(got[0, -1:], reference.run(model, both, CUTS["2"]).logits)


@family
@pytest.mark.parametrize("name", ["tome", "pitome", "downsample", "visionzip"])
def test_what_changes_equal_views_is_refused(family, name):
    for keep in (0.5, 4):
        with fails(f"{name} changes what the vision tower reads .* any size"):
            vlmprune.patch(shared(family), name, keep=keep)


def test_pictures_and_videos_of_one_placeholder_are_refused():
    """GLM-4V's host counts them together, and fails unpruned as well, in words of its own."""
    model = shared("glm4v")
    picture = tiny.prompt(model, [3, "image", 2], [(40, 24)])
    video = tiny.prompt(model, [3, "video", 2], [], videos=[2])
    both = {**picture, **video, **{k: torch.cat((picture[k], video[k]), 1) for k in ("input_ids", "attention_mask")}}
    both["mm_token_type_ids"] = torch.cat((picture["mm_token_type_ids"], video["mm_token_type_ids"]), 1)
    with torch.no_grad():
        with pytest.raises(ValueError, match="do not match"):
            model(**both)
        with vlmprune.patch(model, "random", keep=0.4), fails("write one placeholder for both"):
            model(**both)


def test_scores_of_windows_are_refused():
    model = shared("qwen2_5_vl")
    with pytest.raises(ValueError, match=r"a patch sees its window alone.*take one of 1, 4"):
        vlmprune.patch(model, "fopru", keep=4, layer=3)
    model = tiny.model(family="qwen2_5_vl")
    model.config.vision_config.fullatt_block_indexes = [1]
    with fails(r"reads tower layers 2..4 here, .* its window alone: set start_layer to 1 or less"):
        vlmprune.patch(model, "vtc_cls", keep=4, fallback="received", start_layer=-4)


# -- the rest of what `generate` and users do


@family
def test_reads_of_a_prefill(family, monkeypatch):
    """The counts, and the sizes of pictures once for every kind of them."""
    model = tiny.shared(family=family)
    prompt = prompt_of(model)
    del prompt["attention_mask"]
    apart = family == "glm4v"
    shown = ([3, "video", 2], []) if apart else ([3, "video", 2, "image", 4], [(40, 24)])
    video = tiny.prompt(model, *shown, videos=[2])
    del video["attention_mask"]
    for given, kinds in ((prompt, 1), (video, 1 if apart else 2)):
        for name, more in (("random", {}), ("fopru", {}), ("fastv", {}), ("pool", {}), ("todre", {"pivot": "mean"})):
            model(**given)
            plain = reads(lambda given=given: model(**given), monkeypatch)
            with vlmprune.patch(model, name, keep=0.4, **more) as handle:
                model(**given)
                pruned = reads(lambda given=given: model(**given), monkeypatch)
            promised = 1 + kinds + sum(method.syncs for method in handle.methods)
            assert pruned.total <= plain.total + promised, f"{dict(pruned.seen)} against {dict(plain.seen)}"


@family
@pytest.mark.parametrize("name", ["0", "2", "several"])
def test_prompt_lookup_says_what_greedy_decoding_says(family, name):
    model = shared(family)
    prompt = tiny.prompt(model, [3, "image", 12], [(40, 24)])
    prompt["input_ids"][0, -12:] = torch.tensor([7, 8, 9, 10] * 3)  # so that there is something to guess
    with vlmprune.patch(model, rules(*CUTS[name])):
        asked = {**prompt, "max_new_tokens": 12, "do_sample": False}
        greedy = model.generate(**asked)
        assert torch.equal(model.generate(**asked, prompt_lookup_num_tokens=3), greedy)


@family
def test_a_prefill_in_pieces_is_refused(family):
    model = shared(family)
    prompt, forced = prompt_of(model), random_tokens(1, 2)
    plain = generated_logits(model, prompt, forced, prefill_chunk_size=8)
    with vlmprune.patch(model, "random", keep=0.4):
        try:
            got = generated_logits(model, prompt, forced, prefill_chunk_size=8)
        except UnsupportedError as refused:
            if "prefill_chunk_size` is not supported" not in str(refused):
                raise
        else:  # transformers 5.20 drops the images of a chunked prefill, with or without a patch
            assert torch.equal(got, plain)
            far(plain[:, -3:], generated_logits(model, prompt, forced)[:, -3:])


@family
def test_copies_prune_as_the_model_does(family):
    model = tiny.model(family=family, dtype=F64)
    prompt, forced = prompt_of(model), random_tokens(1, 3)
    with vlmprune.patch(model, "fopru", keep=0.4):
        twin = copy.deepcopy(model)
        assert torch.equal(generated_logits(twin, prompt, forced), generated_logits(model, prompt, forced))
    before = generated_logits(model, prompt, forced)
    far(generated_logits(twin, prompt, forced), before)
    vlmprune.unpatch(twin)
    assert torch.equal(generated_logits(twin, prompt, forced), before)


@family
def test_gradients_reach_the_tower_through_a_cut(family):
    model = tiny.model(family=family, dtype=F64)
    prompt = prompt_of(model)
    for name in ("0", "2", "merge 2"):
        model.zero_grad()
        with vlmprune.patch(model, rules(*CUTS[name])):
            model(**prompt).logits[0, -1].sum().backward()
        got = model.model.visual.blocks[0].mlp.parameters().__next__().grad.clone()
        model.zero_grad()
        reference.run(model, prompt, CUTS[name]).logits.sum().backward()
        want = model.model.visual.blocks[0].mlp.parameters().__next__().grad
        assert want.abs().max() > 0
        same(got / want.abs().max(), want / want.abs().max(), 1e-5)  # their norms are in float32


@family
def test_a_beam_is_as_likely_as_by_hand(family):
    model, cuts = shared(family), CUTS["several"]
    prompt = prompt_of(model)
    if family == "glm4v":  # whose features the host mixes up
        with vlmprune.patch(model, rules(*cuts)), fails("beams, or several answers, to prompts with videos or several"):
            model.generate(**prompt, max_new_tokens=2, do_sample=False, num_beams=2)
        prompt = tiny.prompt(model, [4, "image", 5], [(40, 24)])
    with vlmprune.patch(model, rules(*cuts)):
        out = model.generate(
            **prompt, max_new_tokens=5, do_sample=False, num_beams=3, length_penalty=0.0,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    said = out.sequences[0, prompt["input_ids"].shape[1] :].tolist()
    with torch.no_grad():
        logits = reference.run(model, prompt, cuts, said[:-1]).logits
    want = sum(row.log_softmax(-1)[token] for row, token in zip(logits, said, strict=True))
    same(out.sequences_scores[0].double(), want, 1e-4)  # `generate` adds in float32
