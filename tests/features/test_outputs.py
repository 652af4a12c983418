"""What calls take and give back, on every family with methods that cut before, inside and in front of the language
model: hidden states, attentions, embeddings instead of ids, few logits, padding, rows without pictures."""

from __future__ import annotations

from itertools import chain

import pytest
import reference
import tiny
import torch
from probes import far, same
from scenes import claim, replay, start

from vlmprune import UnsupportedError

METHODS = ["fopru", "fastv", "todre", "tome"]
DICT = {"return_dict_in_generate": True}

pytestmark = pytest.mark.parametrize("name", METHODS)


def shown(prompt):
    """Everything but the tokens: pictures, videos and what belongs to them."""
    return {name: value for name, value in prompt.items() if name not in ("input_ids", "attention_mask")}


def sources(model, prompt, trace):
    """For every layer's input, and for the last states, which column every column of the prompt repeats."""
    ids = prompt["input_ids"][0]
    holes = [(ids == token).nonzero().flatten().tolist() for token in (reference.IMAGE, reference.VIDEO)]
    order = list(chain(*holes))  # images before videos, as in the trace
    found, at = [], {}
    for index in range(tiny.LAYERS):
        for cut in [c for c in trace.cuts if c.layer == index]:
            first = 0
            for i, grid in enumerate(trace.grids):
                for token, column in enumerate(order[first : first + grid.tokens]):
                    at[column] = bool(cut.keep[i, token])
                first += grid.tokens
        alive = [c for c in range(len(ids)) if at.get(c, True)]
        found.append([max((a for a in alive if a <= c), default=alive[0]) for c in range(len(ids))])
    return found


@torch.no_grad()
def test_hidden_states_have_the_prompts_length_and_repeat_what_is_kept(scene, name, support):
    claim(support, scene, name, "hidden states")
    model, prompt = scene.model, scene.prompt()
    width = prompt["input_ids"].shape[1]
    plain = model(**prompt, output_hidden_states=True).hidden_states
    with start(scene, name) as handle:
        out = model(**prompt, output_hidden_states=True)
        logits = model(**prompt).logits
        generated = model.generate(**prompt, **DICT, max_new_tokens=3, do_sample=False, output_hidden_states=True)
    states, trace = out.hidden_states, handle.trace
    assert [h.shape for h in states] == [h.shape for h in plain]
    assert torch.equal(out.logits, logits)
    same(model.lm_head(states[-1]), logits)
    # entry 0 is the input of layer 0, entry i the output of layer i - 1
    found = sources(model, prompt, trace)
    for state, source in zip(states, [found[0], *found], strict=True):
        assert torch.equal(state[0], state[0, source])
    assert any(source != list(range(width)) for source in found)
    first = trace.cuts[0].layer
    if name != "tome":  # whose pictures are others from the start
        for index in range(first + 1 if first else 0):
            same(states[index], plain[index])
    far(states[-1], plain[-1])
    # `generate` has an entry per step, the prompt's first
    steps = generated.hidden_states
    assert [[h.shape[1] for h in step] for step in steps] == [[n] * (tiny.LAYERS + 1) for n in (width, 1, 1)]
    for mine, theirs in zip(steps[0], states, strict=True):
        same(mine, theirs)


@torch.no_grad()
def test_attentions_are_refused(scene, name, support):
    why = "layers see different sequences"
    support("attentions", scene.label, name, refused=scene.refused(name) or why)
    model, prompt = scene.model, scene.prompt()
    with start(scene, name):
        with pytest.raises(UnsupportedError, match=why):
            model(**prompt, output_attentions=True)
        with pytest.raises(UnsupportedError, match=why):
            model.generate(**prompt, **DICT, max_new_tokens=1, do_sample=False, output_attentions=True)
        model(**prompt)


@torch.no_grad()
def test_embeddings_instead_of_ids(scene, name, support):
    """Of text, they run as ever; with pictures nobody can tell where these stand."""
    claim(support, scene, name, "inputs_embeds")
    why = "inputs_embeds hide the placeholders"
    support("inputs_embeds with images", scene.label, name, refused=scene.refused(name) or why)
    model, prompt, asked = scene.model, scene.prompt(), {"max_new_tokens": 4, "do_sample": False}
    text = scene.rows()[1]
    assert not shown(text)
    embeds = model.get_input_embeddings()(text["input_ids"])
    plain, answer = model(**text).logits, model.generate(**text, **asked)[:, text["input_ids"].shape[1] :]
    visual = model.get_input_embeddings()(prompt["input_ids"])
    merged = visual.clone()
    merged[prompt["input_ids"] == reference.IMAGE] = torch.cat(reference.image_features(model, prompt))
    if videos := reference.video_features(model, prompt):
        merged[prompt["input_ids"] == reference.VIDEO] = torch.cat(videos)
    unpruned = model(**prompt).logits
    with start(scene, name) as handle:
        model(**prompt)
        trace = handle.trace
        assert torch.equal(model(inputs_embeds=embeds, attention_mask=text["attention_mask"]).logits, plain)
        got = model.generate(inputs_embeds=embeds, attention_mask=text["attention_mask"], **asked)
        assert torch.equal(got, answer)
        # a call without pictures is not pruned: into these embeddings the caller has put them already
        same(model(inputs_embeds=merged).logits, unpruned)
        assert handle.trace is trace
        with pytest.raises(UnsupportedError, match=why):
            model(inputs_embeds=visual, attention_mask=prompt["attention_mask"], **shown(prompt))


@torch.no_grad()
def test_few_logits_and_tuples(scene, name, support):
    claim(support, scene, name, "scores and logits")
    model, prompt = scene.model, scene.prompt()
    with start(scene, name) as handle:
        want, keep = model(**prompt).logits, [cut.keep for cut in handle.trace.cuts]
        for some in (1, 3, torch.tensor([2, -1])):
            got = model(**prompt, logits_to_keep=some).logits
            same(got, want[:, some] if isinstance(some, torch.Tensor) else want[:, -some:])
            assert all(torch.equal(a, cut.keep) for a, cut in zip(keep, handle.trace.cuts, strict=True))
        assert torch.equal(model(**prompt, return_dict=False)[0], want)
        out = model.generate(**prompt, **DICT, max_new_tokens=4, do_sample=False, output_logits=True, logits_to_keep=1)
        made = reference.image_features(model, prompt), reference.video_features(model, prompt)
    row = out.sequences[0, want.shape[1] :].tolist()
    by_hand, _ = replay(model, prompt, made, handle.trace, forced=row[:-1])
    same(torch.cat(out.logits).double(), by_hand, 1e-4)


@torch.no_grad()
def test_a_batch_padded_right_with_a_row_of_text(scene, name, support):
    claim(support, scene, name, "right padding", "text-only rows")
    model, prompts = scene.model, scene.rows()
    batch = tiny.batch(prompts, "right")
    last = batch["attention_mask"].sum(1) - 1
    with start(scene, name) as handle:
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        out = model(**batch, position_ids=positions)
        trace = handle.trace
        assert [len(p["input_ids"][0]) for p in prompts] == trace.prompt_lengths
        for row, prompt in enumerate(prompts):
            same(out.logits[row, last[row]], model(**prompt).logits[0, -1])
        assert set(trace.sample) == {0, 2}
