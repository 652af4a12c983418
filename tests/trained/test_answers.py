"""Really trained models: what a pruned one says with a cache is what it says without, by hand.

A random model's next words hardly hang on where a cached step stands; a trained one's do. `make test-versions` runs
this folder on every supported minor release of transformers.
"""

from __future__ import annotations

from functools import cache

import probes
import pytest
import reference
import torch
from checked import passes
from conversations import caches, talk
from probes import far, same
from scenes import Turn, replay_turns
from tiny import CACHE

import vlmprune
from vlmprune.eval import testbed
from vlmprune.runtime import loading

SPLIT = {"scene-llava": "sparse", "scene-llava-next": "next"}
#: In front of the language model, inside it, both, in the tower, and by chance
METHODS = ["fopru", "fastv", "todre", "tome", "random"]
TOLERANCE = 1e-8
#: of `QUESTIONS`, at a quarter of the patches; fopru and fastv lose none that the plain model knows
QUESTIONS, KEEP = 2, 0.25


@cache
def trained(name):
    """The model, and (inputs, answer, its tokens) for questions about different pictures."""
    loaded = loading.load(loading.find_model(name), dtype="float64")
    asked = list({record.picture_id: record for record in testbed.questions(SPLIT[name])}.values())[:QUESTIONS]
    made = []
    for record in asked:
        inputs = loading.model_inputs(loaded, [record.image], record.question)
        tokens = loaded.processor.tokenizer(record.answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
        made.append((inputs, tokens))
    return loaded.model, made


def by_hand(model, inputs, trace, forced):
    features = reference.image_features(model, inputs), []
    return replay_turns(model, [Turn(inputs["input_ids"][0].tolist(), features, trace)], forced=forced[0].tolist())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("scene-llava", "dynamic"),
        ("scene-llava", "static"),
        ("scene-llava-next", "dynamic"),
        pytest.param("scene-llava-next", "static", marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_answers_with_a_cache_and_without(name, method, kind):
    model, asked = trained(name)
    right = 0
    for inputs, answer in asked:
        forced = torch.cat((answer, torch.tensor([[9, 8]])), 1)
        with vlmprune.patch(model, method, keep=KEEP) as handle:
            cached = caches(model, kind, columns=900)
            got = probes.generated_logits(model, inputs, forced, **{CACHE: cached}, disable_compile=True)[0]
            want = by_hand(model, inputs, handle.trace, forced)
        same(got, want, TOLERANCE)
        right += torch.equal(got[: answer.shape[1]].argmax(-1), answer[0])
    if method in ("fopru", "fastv"):
        assert right == len(asked)


@pytest.mark.parametrize("method", ["fopru", "todre", "random"])
@pytest.mark.parametrize("name", SPLIT)
@torch.no_grad()
def test_a_step_at_a_wrong_position_says_other_things(name, method):
    """What a host does whose cache our hooks do not see: it counts on from the length of the cache or of the prompt."""
    model, asked = trained(name)
    inputs, answer = asked[0]
    with vlmprune.patch(model, method, keep=KEEP) as handle:
        cached = model(**inputs, use_cache=True)[CACHE]
        want = by_hand(model, inputs, handle.trace, answer)[1:]
    length = inputs["input_ids"].shape[1]
    got = model(input_ids=answer, position_ids=length + torch.arange(answer.shape[1])[None], **{CACHE: cached}).logits[
        0
    ]
    far(got, want, TOLERANCE)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("before", ["text", "plain", "pruned"])
@torch.no_grad()
def test_turns(before, kind):
    """Three, behind padding; the first has a picture or not, and was pruned or not."""
    model, asked = trained("scene-llava")
    pictures = [inputs for inputs, _ in asked]
    text = {"input_ids": pictures[0]["input_ids"][:, -9:]}
    told = [(before, text if before == "text" else pictures[0]), ("pruned", pictures[1]), ("text", text)]
    with vlmprune.patch(model, "todre", keep=KEEP) as handle:
        turns, got, forced = talk(model, handle, told, 3, caches(model, kind, columns=900))
    same(got, replay_turns(model, turns, forced=forced), TOLERANCE)


@pytest.mark.parametrize("name", ["scene-llava", pytest.param("scene-llava-next", marks=pytest.mark.exhaustive)])
def test_the_self_test_passes(name):
    passes(vlmprune.check(trained(name)[0].float(), "todre", keep=KEEP))
    trained(name)[0].double()
