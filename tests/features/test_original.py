"""What models of the original llava package can do: what their Hugging Face twins can, but for a few things that the
package, or transformers with it, refuses or gets wrong."""

from __future__ import annotations

import original
import pytest
import tiny
import torch
from original import PARTS, SIZES, generate
from probes import Heard, far, same
from tiny import CACHE

import vlmprune
from vlmprune import UnsupportedError

METHODS = ["fopru", "fastv", "todre", "tome"]
GREEDY = {"max_new_tokens": 6, "do_sample": False}
DICT = {"return_dict_in_generate": True}

pytestmark = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(params=["llava", "llava_next"], ids=["llava", "next"])
def pair(request, name):
    """The original and its twin, both patched."""
    models = original.pair(request.param)
    for model in models:
        vlmprune.patch(model, name, **({"keep": 0.4} | ({"tau": 0.35} if name == "todre" else {})))
    yield models
    for model in models:
        vlmprune.unpatch(model)


def both(pair, parts=PARTS, sizes=SIZES):
    ours, theirs = original.prompt(pair[1], parts, sizes)
    return ours, theirs, theirs["input_ids"].shape[1]


SEARCHES = {
    "beam search": {"num_beams": 3, "num_return_sequences": 2, "output_scores": True},
    "num_return_sequences": {"num_beams": 3, "num_return_sequences": 3, "output_scores": True},
    "sampling": {"do_sample": True, "temperature": 6.0, "top_k": 0, "num_return_sequences": 2, "output_logits": True},
    "scores and logits": {"output_scores": True, "output_logits": True},
}


@pytest.mark.parametrize("feature", SEARCHES)
@torch.no_grad()
def test_it_generates_what_its_twin_does(pair, name, feature, support):
    (model, twin), (ours, theirs, length) = pair, both(pair)
    support(feature, model, name)
    asked = GREEDY | DICT | SEARCHES[feature]
    torch.manual_seed(0)
    got = generate(model, ours, **asked)
    torch.manual_seed(0)
    want = twin.generate(**theirs, **asked)
    assert torch.equal(got.sequences, want.sequences[:, length:])
    for field in ("logits", "scores", "sequences_scores"):
        mine, other = getattr(got, field, None), getattr(want, field, None)
        if mine is not None:
            mine, other = (torch.stack(x) if isinstance(x, tuple) else x for x in (mine, other))
            assert torch.equal(mine.isfinite(), other.isfinite())
            same(mine[mine.isfinite()], other[other.isfinite()], 1e-5)


@torch.no_grad()
def test_streaming(pair, name, support):
    (model, _), (ours, _, _), heard = pair, both(pair), Heard()
    support("streaming", model, name)
    want = generate(model, ours, **GREEDY)
    assert torch.equal(generate(model, ours, **GREEDY, streamer=heard), want)
    assert heard.ended
    assert heard.tokens == want[0].tolist()


@torch.no_grad()
def test_without_a_cache(pair, name, support):
    """The host's `generate`, which starts from embeddings, keeps a cache whatever it is told."""
    (model, _), (ours, _, _) = pair, both(pair)
    support("no cache", model, name)
    want = generate(model, ours, **GREEDY, **DICT, output_logits=True)
    got = generate(model, ours, **GREEDY, **DICT, output_logits=True, use_cache=False)
    assert getattr(got, CACHE) is not None
    assert torch.equal(got.sequences, want.sequences)
    assert torch.equal(torch.stack(got.logits), torch.stack(want.logits))
    same(model(**ours, use_cache=False).logits[:, -1], want.logits[0].double(), 1e-5)


@torch.no_grad()
def test_prompt_lookup(pair, name, support):
    """It looks up among the new tokens alone: `generate` starts from embeddings."""
    (model, _), (ours, _, _) = pair, both(pair)
    support("prompt lookup", model, name)
    asked = GREEDY | {"max_new_tokens": 16}
    calls = []
    hook = model.model.register_forward_pre_hook(lambda module, args: calls.append(1))
    want = generate(model, ours, **asked)
    once = len(calls)
    got = generate(model, ours, **asked, prompt_lookup_num_tokens=3)
    hook.remove()
    assert torch.equal(got, want)
    assert once == 16
    assert len(calls) - once < once  # some guesses were right


@torch.no_grad()
def test_assistants_are_refused_by_the_host(pair, name, support):
    (model, _), (ours, _, _) = pair, both(pair)
    support("assisted decoding", model, name, refused="the llava package's generate gives an assistant no prompt")
    with pytest.raises(NotImplementedError, match="inputs_embeds"):
        generate(model, ours, **GREEDY, assistant_model=model)
    with pytest.raises(NotImplementedError, match="inputs_embeds"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 32, dtype=torch.float64))


@torch.no_grad()
def test_recording_layers_is_refused(pair, name, support):
    (model, _), (ours, _, _) = pair, both(pair)
    why = "records every layer of the vision tower twice"
    support("hidden states", model, name, refused=f"transformers {why}")
    support("attentions", model, name, refused="layers see different sequences")
    want = model(**ours).logits
    text = {"input_ids": ours["input_ids"].abs() % 60}
    for call in ({"output_hidden_states": True}, {"output_attentions": True}):
        with pytest.raises(UnsupportedError, match=f"{next(iter(call))} .*{why}.*llava-hf"):
            model(**ours, **call)
        with pytest.raises(UnsupportedError, match=why):
            model(**text, **call)
        with pytest.raises(UnsupportedError, match=why):
            generate(model, ours, **GREEDY, **DICT, **call)
    assert torch.equal(model(**ours).logits, want)


@torch.no_grad()
def test_a_model_that_has_recorded_layers_is_refused(name):
    """Transformers puts its recorders on the tower a second time: the unpatched model itself goes wrong."""
    _, twin = original.pair()
    model, (ours, _) = original.model(twin), original.prompt(twin, PARTS, SIZES)
    plain = model(**ours).logits
    model(**ours, output_hidden_states=True)
    far(model(**ours).logits, plain)
    with pytest.raises(
        UnsupportedError, match=r"was run with output_hidden_states or output_attentions.*Load it again"
    ):
        vlmprune.patch(model, name, keep=0.4)


@torch.no_grad()
def test_text_as_embeddings(pair, name, support):
    model, _ = pair
    support("inputs_embeds", model, name)
    ids = torch.tensor([[6, 7, 8, 9]])
    embeds = model.get_input_embeddings()(ids)
    got = model(inputs_embeds=embeds).logits
    vlmprune.unpatch(model)
    assert torch.equal(got, model(inputs_embeds=embeds).logits)
    assert got.shape == (1, 4, tiny.VOCAB)
