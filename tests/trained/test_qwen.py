"""scene-qwen, really trained: pictures of any shape, and positions on three axes that a decoded word hangs on.

It describes a picture in a dozen words, so that a step at a wrong position is not only other numbers, but other words.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import films
import probes
import pytest
import reference
import torch
from checked import passes
from conversations import caches
from probes import far, same
from scenes import Turn, replay_turns
from tiny import CACHE

import vlmprune
from vlmprune.engine import prefill
from vlmprune.eval import testbed
from vlmprune.runtime import loading
from vlmprune.runtime.videos import VideoClip

METHODS = {"fopru": {}, "fastv": {}, "todre": {"pivot": "mean"}, "random": {}}
KEEP, TOLERANCE, WORDS = 0.25, 1e-8, 12
CAPTION = "describe the picture ."
methods = pytest.mark.parametrize("name", METHODS)


@cache
def loaded():
    return loading.load(loading.find_model("scene-qwen"), dtype="float64")


@cache
def shown():
    """A wide picture, a tall one and a square one, with a question about a colour each."""
    records = [record for record in testbed.questions("qwen") if record.category == "colour"]
    kinds = {
        "wide": lambda w, h: w > 1.5 * h,
        "tall": lambda w, h: h > 1.5 * w,
        "square": lambda w, h: w == h,
    }
    return {kind: next(r for r in records if fits(*r.image.size)) for kind, fits in kinds.items()}


def asked(kind="wide", question=None):
    record = shown()[kind]
    return loading.model_inputs(loaded(), [record.image], question or record.question)


@torch.no_grad()
def said(model, inputs):
    """`(1, words)` what the model says, without its end."""
    out = model.generate(**inputs, max_new_tokens=WORDS, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return out[:, out[0] != model.generation_config.eos_token_id]


def by_hand(model, inputs, trace, forced):
    turn = Turn(inputs["input_ids"][0].tolist(), (reference.image_features(model, inputs), []), trace)
    return replay_turns(model, [turn], forced=forced[0].tolist(), prompt=inputs)


def patched(name):
    return vlmprune.patch(loaded().model, name, keep=KEEP, **METHODS[name])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@methods
@torch.no_grad()
def test_answers_with_a_cache_and_without(name, kind):
    model = loaded().model
    for shape in shown():
        inputs = asked(shape, CAPTION)
        forced = said(model, inputs)
        with patched(name) as handle:
            cached = caches(model, kind)
            got = probes.generated_logits(model, inputs, forced, **{CACHE: cached}, disable_compile=True)[0]
            want = by_hand(model, inputs, handle.trace, forced)
        same(got, want, TOLERANCE)


@pytest.mark.parametrize("name", ["fopru", "fastv", "todre"])
def test_a_quarter_of_the_tokens_is_enough_for_these_answers(name):
    processor = loaded().processor
    with patched(name) as handle:
        for shape, record in shown().items():
            tokens = said(handle.model, asked(shape))
            assert processor.batch_decode(tokens, skip_special_tokens=True)[0].strip() == record.answer
            assert handle.trace.counts[0]["patches_after"] <= KEEP * handle.trace.counts[0]["patches_before"] + 1


@methods
@torch.no_grad()
def test_a_step_that_counts_columns_says_other_words(name):
    """What a host does that does not know where its conversation goes on: its cache holds more columns than places."""
    model, inputs = loaded().model, asked("tall", CAPTION)
    forced = said(model, inputs)
    with patched(name) as handle:
        cached = model(**inputs, use_cache=True)[CACHE]
        want = by_hand(model, inputs, handle.trace, forced)[1:]
        columns = inputs["input_ids"].shape[1] + torch.arange(forced.shape[1])
        got = model(input_ids=forced, position_ids=columns.expand(3, 1, -1), **{CACHE: cached}).logits[0]
    far(got, want, TOLERANCE)
    assert not torch.equal(got.argmax(-1), want.argmax(-1))


@torch.no_grad()
def test_a_cache_that_forgot_where_it_goes_on_says_other_words(monkeypatch):
    model, inputs = loaded().model, asked("tall", CAPTION)
    with patched("fopru"):
        right = said(model, inputs)
        monkeypatch.setattr(
            prefill, "onward", lambda positions, real: torch.full((positions.shape[1], 1), positions.shape[-1])
        )
        assert not torch.equal(said(model, inputs), right)


def whole(done, turn):
    """A turn as `generate` is handed it: behind all of the conversation, of which the cache tells what is new."""
    ids = torch.cat([torch.tensor([t.ids]) for t in done] + [turn["input_ids"]], 1)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {name: value for name, value in turn.items() if not done or name != "mm_token_type_ids"} | given


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_turns(kind):
    """A picture, a question about it in text alone, and another picture."""
    model, processor = loaded().model, loaded().processor
    pictures = [asked("wide"), asked("tall", CAPTION)]
    words = processor.tokenizer("user: how many objects are there ? assistant:", return_tensors="pt")
    turns = [pictures[0], {"input_ids": words["input_ids"]}, pictures[1]]
    forced, cached, done = torch.tensor([[9, 8]]), caches(model, kind, columns=900), []
    with patched("todre") as handle:
        for turn in turns:
            inputs = whole(done, turn)
            got = probes.generated_logits(model, inputs, forced, **{CACHE: cached}, disable_compile=True)[0]
            features = reference.image_features(model, turn), []
            said_too = turn["input_ids"][0].tolist() + forced[0].tolist()
            done.append(Turn(said_too, features, handle.trace if features[0] else None))
    done[-1] = replace(done[-1], ids=done[-1].ids[: -forced.shape[1]])
    ids = torch.tensor([[token for turn in done for token in turn.ids]])
    prompt = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == model.config.image_token_id).long(),
        "image_grid_thw": torch.cat([turn["image_grid_thw"] for turn in pictures]),
    }
    same(got, replay_turns(model, done, forced=forced[0].tolist(), prompt=prompt), TOLERANCE)


# Videos, of drawn scenes as the model knows them, though it was never trained on any


def filmed(colour, question, frames=6):
    """A circle that moves to the right, every second frame of it read."""
    clip = VideoClip(
        frames=tuple(films.moving(2 * frames, colour)[::2]), numbers=tuple(range(0, 2 * frames, 2)),
        seconds=tuple(number / 10 for number in range(0, 2 * frames, 2)), total=2 * frames, rate=10.0,
    )  # fmt: skip
    return loading.model_inputs(loaded(), [clip], question)


RED, GREEN = (200, 30, 30), (30, 160, 60)


@methods
@torch.no_grad()
def test_a_video_is_answered_as_by_hand(name):
    """Three pairs of frames; with a quarter of its tokens the colour is still told."""
    model = loaded().model
    for colour, word in ((RED, "red"), (GREEN, "green")):
        inputs = filmed(colour, "what colour is the circle ?")
        forced = said(model, inputs)
        assert loaded().processor.batch_decode(forced, skip_special_tokens=True)[0].strip() == word
        with patched(name) as handle:
            got = probes.generated_logits(model, inputs, forced)[0]
            turn = Turn(inputs["input_ids"][0].tolist(), ([], reference.video_features(model, inputs)), handle.trace)
            (counts,) = handle.trace.counts
        want = replay_turns(model, [turn], forced=forced[0].tolist(), prompt=inputs)
        same(got, want, TOLERANCE)
        assert counts["patches_after"] <= counts["patches_before"] // 4 + 1
        assert got[0].argmax() == forced[0, 0] or name == "random"


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_two_conversations_about_videos_take_turns(kind):
    """A video, a question about it in text alone, another conversation between the two; then a picture."""
    model, processor = loaded().model, loaded().processor
    first, picture = filmed(RED, "what colour is the circle ?"), asked("tall", CAPTION)
    words = processor.tokenizer("user: is there a red circle ? assistant:", return_tensors="pt")
    turns = [first, {"input_ids": words["input_ids"]}, picture]
    forced, cached, other, done = torch.tensor([[9, 8]]), caches(model, kind, columns=900), caches(model, kind), []
    with patched("todre") as handle:
        for turn in turns:
            inputs = whole(done, turn)
            got = probes.generated_logits(model, inputs, forced, **{CACHE: cached}, disable_compile=True)[0]
            trace = handle.trace if "input_ids" in turn and len(turn) > 1 else None
            features = reference.image_features(model, turn), reference.video_features(model, turn)
            done.append(Turn(turn["input_ids"][0].tolist() + forced[0].tolist(), features, trace))
            if turn is first:  # somebody else talks about another film, on the same model
                between = filmed(GREEN, CAPTION, 4)
                probes.generated_logits(model, between, forced, **{CACHE: other}, disable_compile=True)
    done[-1] = replace(done[-1], ids=done[-1].ids[: -forced.shape[1]])
    ids = torch.tensor([[token for turn in done for token in turn.ids]])
    config = model.config
    prompt = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == config.image_token_id) + 2 * (ids == config.video_token_id),
        "image_grid_thw": picture["image_grid_thw"],
        "video_grid_thw": first["video_grid_thw"],
        "second_per_grid_ts": first["second_per_grid_ts"],
    }
    same(got, replay_turns(model, done, forced=forced[0].tolist(), prompt=prompt), TOLERANCE)


def test_a_picture_behind_a_cache_of_the_unpruned_model_is_refused():
    model, first = loaded().model, asked("wide")
    cached = caches(model, "dynamic")
    with patched("fopru") as handle:
        with handle.disabled():
            model.generate(**first, **{CACHE: cached}, max_new_tokens=1, do_sample=False)
        inputs = whole([Turn(first["input_ids"][0].tolist())], asked("tall"))
        with pytest.raises(vlmprune.UnsupportedError, match="3 axes"):
            model.generate(**inputs, **{CACHE: cached}, max_new_tokens=1, do_sample=False)


@methods
@torch.no_grad()
def test_a_row_of_a_batch_is_that_row_alone(name):
    """Three shapes in one batch, padded on the left by what the pictures differ in."""
    model, processor = loaded().model, loaded().processor
    records = list(shown().values())
    texts = [loading.prompt_text(processor, {"image": 1, "video": 0}, CAPTION)] * len(records)
    batch = processor(text=texts, images=[[r.image] for r in records], padding=True, return_tensors="pt")
    assert not batch["attention_mask"].all()
    batch["pixel_values"] = batch["pixel_values"].double()
    forced = said(model, asked("square", CAPTION))
    with patched(name):
        together = probes.generated_logits(model, dict(batch), forced.expand(len(records), -1))
        for row, shape in enumerate(shown()):
            same(together[row], probes.generated_logits(model, asked(shape, CAPTION), forced)[0], TOLERANCE)


def test_the_self_test_passes():
    passes(vlmprune.check(loaded().model.float(), "todre", keep=KEEP, pivot="mean"))
    loaded().model.double()
