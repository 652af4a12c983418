"""Second turns on the returned cache, with real methods on every family.

What every turn's trace says was kept is carried out by hand on the whole conversation, which has no cache.
"""

from __future__ import annotations

from contextlib import nullcontext

import probes
import pytest
import reference
import tiny
import torch
from probes import far, same
from scenes import FAMILIES, FORCED, Scene, Turn, replay_turns, start
from tiny import CACHE

from vlmprune import UnsupportedError

METHODS = ["fopru", "fastv", "todre", "tome"]  # cut before the language model, inside it, both, in the tower


def hear(model, handle, turns, prompt, cache, answer=2, plain=False):
    """One turn through `generate`: all ids so far, and the pictures of this turn; adds what happened to `turns`."""
    ids = torch.cat([torch.tensor([[token for turn in turns for token in turn.ids]]).long(), prompt["input_ids"]], 1)
    asked = prompt | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with handle.disabled() if plain else nullcontext():
        out = model.generate(
            **asked, max_new_tokens=answer + 1, do_sample=False, **{CACHE: cache}, return_dict_in_generate=True
        )
        features = reference.image_features(model, prompt), reference.video_features(model, prompt)
    said = out.sequences[0, ids.shape[1] : -1].tolist()  # the last word has not been read
    pictured = any(features)
    turns.append(
        Turn(prompt["input_ids"][0].tolist() + said, features, handle.trace if pictured and not plain else None)
    )
    return out[CACHE]


def ask(model, turns, prompt, cache):
    """Logits `(1 + forced, vocab)` behind the last turn, through `generate`."""
    ids = torch.cat([torch.tensor([[token for turn in turns for token in turn.ids]]), prompt["input_ids"]], 1)
    asked = prompt | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return probes.generated_logits(model, asked, torch.tensor([FORCED]), **{CACHE: cache})[0]


def other(trace):
    return "original" if trace.cuts[0].positions == "contiguous" else "contiguous"


@pytest.mark.parametrize("name", METHODS)
def test_a_second_turn_of_text(scene, name, support):
    support("second turn, text", scene, name)
    model, turns = scene.model, []
    text = tiny.prompt(model, [7], [], seed=7)
    with torch.no_grad(), start(scene, name) as handle:
        cache = hear(model, handle, turns, scene.prompt(), None)
        got = ask(model, turns, text, cache)
        turns.append(Turn(text["input_ids"][0].tolist()))
        same(got, replay_turns(model, turns))
        if "sliding_window" not in scene.options:  # which has passed by what was cut
            far(got, replay_turns(model, turns, positions=other(turns[0].trace), at=0))


@pytest.mark.parametrize("name", METHODS)
def test_a_second_turn_with_a_new_image(scene, name, support):
    support("second turn, new image", scene, name)
    model, turns = scene.model, []
    with torch.no_grad(), start(scene, name) as handle:
        cache = hear(model, handle, turns, scene.prompt(), None)
        question = scene.questions()[1]
        got = ask(model, turns, question, cache)
        features = reference.image_features(model, question), reference.video_features(model, question)
        turns.append(Turn(question["input_ids"][0].tolist(), features, handle.trace))
        same(got, replay_turns(model, turns))
        assert turns[0].trace is not turns[1].trace
        far(got, replay_turns(model, turns, positions=other(handle.trace)))
        if handle.trace.cuts[-1].merge is None:
            far(got, replay_turns(model, turns, wrong=True))


@pytest.mark.parametrize("pictured", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("guesser", ["prompt lookup", "assisted decoding"])
@pytest.mark.parametrize("name", METHODS)
def test_guesses_in_a_second_turn_are_refused(name, guesser, pictured, support):
    """The host sends the whole conversation again, where the cache holds a part of it: it would be there twice."""
    scene, turns = Scene(*FAMILIES["llava"]), []
    model = scene.model
    support(f"{guesser}, second turn", scene, name, refused="the host sends the whole conversation again")
    guess = {"prompt_lookup_num_tokens": 3} if guesser == "prompt lookup" else {"assistant_model": model}
    with torch.no_grad(), start(scene, name) as handle:
        cache = hear(model, handle, turns, scene.prompt(), None)
        held = [cache.get_seq_length(layer) for layer in range(tiny.LAYERS)]
        new = scene.questions()[1] if pictured else tiny.prompt(model, [7], [], seed=7)
        ids = torch.cat([torch.tensor([turns[0].ids]), new["input_ids"]], 1)
        asked = new | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with pytest.raises(UnsupportedError, match=r"whole conversation.*again.*Leave these out"):
            model.generate(**asked, max_new_tokens=4, do_sample=False, **{CACHE: cache}, **guess)
        assert held == [cache.get_seq_length(layer) for layer in range(tiny.LAYERS)]


@pytest.mark.parametrize("plain", [(0,), (1,), (0, 1)], ids=["first plain", "second plain", "both plain"])
@pytest.mark.parametrize("name", METHODS)
def test_turns_that_are_not_pruned(name, plain):
    scene, turns, cache = Scene(*FAMILIES["next"]), [], None
    model = scene.model
    with torch.no_grad(), start(scene, name) as handle:
        for i, prompt in enumerate([scene.prompt(), *scene.questions()]):
            if i == 2:
                got = ask(model, turns, prompt, cache)
                features = reference.image_features(model, prompt), ()
                turns.append(Turn(prompt["input_ids"][0].tolist(), features, handle.trace))
            else:
                cache = hear(model, handle, turns, prompt, cache, plain=i in plain)
        same(got, replay_turns(model, turns))
        far(got, replay_turns(model, turns, positions=other(handle.trace)))


@pytest.mark.parametrize("name", [*METHODS, "vtc_cls", "transprune", "atp", "globalcom2", "pool"])
@pytest.mark.parametrize("kind", ["llava", "next"])
def test_rows_of_a_batch_go_on_as_they_do_alone(kind, name):
    """Prompts and questions of different lengths, so that there is padding inside the rows."""
    scene = Scene(*FAMILIES[kind])
    model, steps = scene.model, torch.tensor([FORCED])
    first, second = scene.rows()[:1] + scene.rows()[2:], scene.questions()[::-1]

    def converse(firsts, seconds):
        together, more, said = tiny.batch(firsts), tiny.batch(seconds), steps.expand(len(firsts), -1)
        opening = said[:, :1].clone()
        out = model.generate(
            **together, max_new_tokens=2, do_sample=False, return_dict_in_generate=True,
            logits_processor=[probes.Force(said, together["input_ids"].shape[1])],
        )  # fmt: skip
        ids = torch.cat((together["input_ids"], opening, more["input_ids"]), 1)
        mask = torch.cat((together["attention_mask"], torch.ones_like(opening), more["attention_mask"]), 1)
        asked = more | {"input_ids": ids, "attention_mask": mask}
        return probes.generated_logits(model, asked, said, **{CACHE: out[CACHE]})

    with torch.no_grad(), start(scene, name) as handle:
        got = converse(first, second)
        kept = [handle.trace.kept(i) for i in range(2)]
        for row in range(2):
            want = converse(first[row : row + 1], second[row : row + 1])
            same(got[row : row + 1], want)
            assert handle.trace.kept() == kept[row]
    far(got[0], got[1])
