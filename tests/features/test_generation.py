"""What `generate` can do, on every family with methods that cut before, inside and in front of the language model.

What was kept is taken from the trace and carried out by hand (tests/scenes.py).
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import reference
import tiny
import torch
from probes import Heard, far, same
from scenes import claim, replay, start
from tiny import CACHE
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteriaList

import vlmprune

# before the LLM; inside; both; in the tower
METHODS = ["fopru", "fastv", "todre", "tome"]
GREEDY = {"max_new_tokens": 6, "do_sample": False}
DICT = {"return_dict_in_generate": True}
FLOAT = 1e-4  # what `generate` returns of logits is float32

pytestmark = pytest.mark.parametrize("name", METHODS)


def features(model, prompt):
    return reference.image_features(model, prompt), reference.video_features(model, prompt)


def said(out, prompt):
    """The new tokens of every row."""
    return [row[prompt["input_ids"].shape[1] :].tolist() for row in out]


def first_row(trace):
    """The part of a trace that is about the first row of a batch (images of all rows come before videos)."""
    rows = [i for i, row in enumerate(trace.sample) if row == 0]
    merges = [
        cut.merge and replace(cut.merge, into=cut.merge.into[rows], weight=cut.merge.weight[rows]) for cut in trace.cuts
    ]
    cuts = [replace(cut, keep=cut.keep[rows], merge=merge) for cut, merge in zip(trace.cuts, merges, strict=True)]
    return replace(trace, cuts=cuts)


def kept(trace):
    return [cut.keep.tolist() for cut in trace.cuts]


@torch.no_grad()
def test_beam_scores_are_those_of_the_beams_by_hand(scene, name, support):
    claim(support, scene, name, "beam search", "num_return_sequences")
    model, prompt = scene.model, scene.prompt()
    with start(scene, name) as handle:
        out = model.generate(**prompt, **DICT, do_sample=False, max_new_tokens=4, num_beams=3, num_return_sequences=3,
                             length_penalty=0.0, output_scores=True)  # fmt: skip
        made = features(model, prompt)

    trace = first_row(handle.trace)

    def score(tokens, **twin):
        logits, _ = replay(model, prompt, made, trace, forced=tokens[:-1], **twin)
        return logits.log_softmax(-1)[range(4), tokens].sum()

    beams = said(out.sequences, prompt)
    assert len({tuple(beam) for beam in beams}) == 3
    same(out.sequences_scores.double(), torch.stack([score(beam) for beam in beams]), FLOAT)
    other = "original" if trace.cuts[0].positions == "contiguous" else "contiguous"
    far(out.sequences_scores.double(), torch.stack([score(beam, positions=other) for beam in beams]), 1e-5)


@torch.no_grad()
def test_samples_are_drawn_from_the_distribution_by_hand(scene, name, support):
    claim(support, scene, name, "sampling", "num_return_sequences", "scores and logits")
    model, prompt, heat = scene.model, scene.prompt(), 6.0
    with start(scene, name) as handle:
        torch.manual_seed(5)
        out = model.generate(**prompt, **DICT, do_sample=True, max_new_tokens=4, num_return_sequences=2, top_k=0,
                             temperature=heat, output_logits=True, output_scores=True)  # fmt: skip
        made = features(model, prompt)
    drawn = said(out.sequences, prompt)
    assert drawn[0] != drawn[1]
    trace = first_row(handle.trace)
    by_hand = torch.stack([replay(model, prompt, made, trace, forced=row[:-1])[0] for row in drawn])
    same(torch.stack(out.logits, 1).double(), by_hand, FLOAT)
    same(torch.stack(out.scores, 1).double(), by_hand / heat, FLOAT)
    torch.manual_seed(5)
    steps = [torch.multinomial((logits.float() / heat).softmax(-1), 1) for logits in by_hand.unbind(1)]
    assert torch.cat(steps, 1).tolist() == drawn


@lru_cache
def small():
    """A language model that knows the vocabulary and nothing else."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tiny.VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    made = LlamaForCausalLM(config).double().eval()
    made.generation_config.eos_token_id = None
    return made


def repeated(scene):
    """A prompt in whose end a lookup finds something to go on with, before any token is generated."""
    prompt = scene.questions()[0]
    prompt["input_ids"][0, -4:] = torch.tensor([7, 8, 7, 8])
    return prompt


@torch.no_grad()
def test_assisted_decoding_says_what_greedy_decoding_says(scene, name, support):
    """Guesses stand behind the prompt in the prefill already: nothing that is kept may depend on them."""
    claim(support, scene, name, "assisted decoding")
    model, prompt = scene.model, repeated(scene)
    another = tiny.shared(dtype=torch.float64, seed=1, **scene.options)
    length = prompt["input_ids"].shape[1]
    with start(scene, name) as handle:
        want = model.generate(**prompt, **GREEDY)
        alone = kept(handle.trace)
        assert handle.trace.prompt_length == length
        for assistant, patched in ((small(), False), (another, False), (another, True), (model, True)):
            if patched and assistant is another:
                vlmprune.patch(another, "random", keep=0.4)
            try:
                got = model.generate(**prompt, **GREEDY, assistant_model=assistant)
            finally:
                vlmprune.unpatch(another)
            assert torch.equal(got, want)
            assert kept(handle.trace) == alone
            assert handle.trace.prompt_length > length  # there was something to be misled by


@torch.no_grad()
def test_prompt_lookup_says_what_greedy_decoding_says(scene, name, support):
    claim(support, scene, name, "prompt lookup")
    model, prompt = scene.model, repeated(scene)
    length = prompt["input_ids"].shape[1]
    with start(scene, name) as handle:
        want = model.generate(**prompt, **GREEDY)
        alone = kept(handle.trace)
        assert handle.trace.prompt_length == length
        assert torch.equal(model.generate(**prompt, **GREEDY, prompt_lookup_num_tokens=3), want)
        assert kept(handle.trace) == alone
        assert handle.trace.prompt_length > length


@torch.no_grad()
def test_speculative_sampling_has_the_logits_by_hand(scene, name, support):
    claim(support, scene, name, "assisted decoding", "scores and logits")
    model, prompt = scene.model, repeated(scene)
    with start(scene, name) as handle:
        alone = model.generate(**prompt, max_new_tokens=1, do_sample=False)
        want = kept(handle.trace)
        torch.manual_seed(3)
        out = model.generate(**prompt, **DICT, do_sample=True, top_k=0, temperature=3.0, max_new_tokens=6,
                             assistant_model=small(), output_logits=True)  # fmt: skip
        made = features(model, prompt)
    assert kept(handle.trace) == want
    row = out.sequences[0, alone.shape[1] - 1 :].tolist()
    # the trace counts guesses as prompt; what is kept of pictures is no different
    by_hand, _ = replay(model, prompt, made, handle.trace, forced=row[:-1])
    same(torch.cat(out.logits).double(), by_hand, FLOAT)


@torch.no_grad()
def test_without_a_cache(scene, name, support):
    claim(support, scene, name, "no cache")
    model, prompt = scene.model, scene.prompt()
    asked = {**GREEDY, **DICT, "output_logits": True}
    with start(scene, name) as handle:
        with_one = model.generate(**prompt, **asked)
        before = kept(handle.trace)
        out = model.generate(**prompt, **asked, use_cache=False)
        made = features(model, prompt)
    assert getattr(out, CACHE) is None
    # the prompt grows by every token, and what is kept of it is decided anew
    row = said(out.sequences, prompt)[0]
    assert row[0] == said(with_one.sequences, prompt)[0][0]
    grown = prompt | {"input_ids": out.sequences[:, :-1], "attention_mask": torch.ones_like(out.sequences[:, :-1])}
    last = replay(model, grown, made, handle.trace, forced=[])[0]
    same(out.logits[-1].double(), last, FLOAT)
    same(out.logits[0].double(), with_one.logits[0].double(), FLOAT)
    if name in ("fopru", "tome"):  # these look at pictures alone
        assert kept(handle.trace) == before
        assert torch.equal(out.sequences, with_one.sequences)


@torch.no_grad()
def test_streaming(family_scene, name, support):
    scene = family_scene
    claim(support, scene, name, "streaming")
    model, prompt, heard = scene.model, scene.prompt(), Heard()
    with start(scene, name):
        want = model.generate(**prompt, **GREEDY)
        got = model.generate(**prompt, **GREEDY, streamer=heard)
    assert torch.equal(got, want)
    assert heard.ended
    assert heard.tokens == want[0].tolist()


@torch.no_grad()
def test_stopping(family_scene, name, support):
    """One token, and criteria that see every token so far."""
    scene = family_scene
    claim(support, scene, name, "stopping criteria")
    model, prompt = scene.model, scene.prompt()
    length = prompt["input_ids"].shape[1]
    with start(scene, name) as handle:
        first = model(**prompt).logits[:, -1].argmax(-1)
        one = model.generate(**prompt, max_new_tokens=1, do_sample=False)
        assert one[0, length:].tolist() == first.tolist()
        assert handle.trace.prompt_length == length
        want = model.generate(**prompt, **GREEDY)
        with pytest.raises(ValueError, match="max_new_tokens"):
            model.generate(**prompt, max_new_tokens=0)
        lengths = []

        def stop(ids, scores, **kwargs):
            lengths.append(ids.shape[1])
            return torch.tensor([ids.shape[1] >= length + 3])

        got = model.generate(**prompt, **GREEDY, stopping_criteria=StoppingCriteriaList([stop]))
    assert torch.equal(got, want[:, : length + 3])
    assert lengths == [length + 1, length + 2, length + 3]
