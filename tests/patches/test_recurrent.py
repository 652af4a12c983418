"""Qwen3.5: most layers have a state instead of attention, which no cut can take back, and padding reaches.

Its recurrent layers and norms compute in float32 whatever the model's type, so all is as near to by-hand as that.
"""

from __future__ import annotations

from functools import partial

import conversations
import pytest
import reference
import tiny
import torch
from probes import generated_logits, random_tokens, rules
from reference import Rule
from scenes import MOVING, OWN, Scene, options, replay, told, with_cache
from tiny import CACHE
from transformers import DynamicCache

import vlmprune
from vlmprune import UnsupportedError, registry
from vlmprune.patches.language_models import GatedRotaryLayer, NormedRotaryLayer

NEAR = {"rtol": 1e-5, "atol": 3e-6}
LABELS = {"images": "qwen3.5", "videos": "qwen3.5-video"}
SCENES = {kind: Scene(*OWN[label]) for kind, label in LABELS.items()}
FEATURES = ("exact", "batches", "unpatching")  # that every method is tested for
#: 2 is a recurrent layer.
CUTS = {name: reference.ON_AXES[name] for name in ("0", "2", "3", "several", "merge 0", "merge 2")}
cuts = pytest.mark.parametrize("name", CUTS)
#: What reads the attention of layer 1 or 3 by default on four layers; others say a layer that has some.
LAYERS = {"fastv": {"layer": 2}, "dart": {"layer": 2}}


def model():
    return SCENES["images"].model


def prompt_of(seed=0):
    return tiny.prompt(model(), [4, "image", 3, "image", 5], [(40, 24), (20, 70)], seed)


def near(got, want):
    torch.testing.assert_close(got, want, **NEAR)


def far(a, b):
    assert (a - b).abs().max() > 1e-3


@cuts
def test_a_cut_is_what_it_is_by_hand(name):
    """Several pictures in a row, and what is decoded behind them, with a dynamic and a static cache."""
    prompt, forced, made = prompt_of(), random_tokens(1, 5), CUTS[name]
    with torch.no_grad():
        want = reference.run(model(), prompt, made, forced[0].tolist()).logits
        far(want, reference.run(model(), prompt, reference.wrong(made), forced[0].tolist()).logits)
        with vlmprune.patch(model(), rules(*made)) as handle:
            near(generated_logits(model(), prompt, forced)[0], want)
            lengths = handle.trace.kv_lengths
            static = {"cache_implementation": "static", "disable_compile": True}
            near(generated_logits(model(), prompt, forced, **static)[0], want)
            out = model()(**prompt, use_cache=True)
    assert out[CACHE].layers[1].get_seq_length() == lengths[1]
    assert out[CACHE].layers[3].get_seq_length() == lengths[3] < prompt["input_ids"].shape[1]


@pytest.mark.parametrize("kind", SCENES)
@pytest.mark.parametrize("name", registry.names())
def test_every_method(kind, name, support):
    """What its trace says is what was computed, in a row and in a padded batch; what looks at no attention is told."""
    scene = SCENES[kind]
    prompt, given = scene.prompt(name), options(scene.model, name) | LAYERS.get(name, {})
    claim = partial(support, family=LABELS[kind], method=name)
    before = scene.model(**prompt).logits.detach()
    try:
        handle = vlmprune.patch(scene.model, name, **given)
    except (UnsupportedError, ValueError) as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert any(
            words in refused
            for words in ("packs pictures of any size", "single view", "recurrent", "reads pictures whole")
        ), refused
        for feature in FEATURES:
            claim(feature, refused=told(refused))
        pytest.skip(f"refused, as it should be: {refused}")
    words = scene.refusal(name)
    for feature in FEATURES:
        claim(feature, refused=told(words))
    if words:
        with handle, torch.no_grad(), pytest.raises(UnsupportedError):
            scene.model(**prompt)
        pytest.skip(f"refused, as it should be: {words}")
    with torch.no_grad(), handle:
        got = with_cache(scene.model, prompt)[:, 0]
        trace = handle.trace
        features = reference.image_features(scene.model, prompt), reference.video_features(scene.model, prompt)
        rows = scene.rows(name)
        together = with_cache(scene.model, tiny.batch(rows))
        alone = [with_cache(scene.model, row)[:, 0] for row in rows]
    with torch.no_grad():
        want, cut = replay(scene.model, prompt, features, trace)
        near(got, want)
        for row, each in enumerate(alone):
            near(together[:, row], each)
        if cut and trace.cuts[-1].merge is None:
            assert (replay(scene.model, prompt, features, trace, wrong=True)[0] - got).abs().max() > 1e-5
        assert torch.equal(scene.model(**prompt).logits, before)
    assert cut or name in ("m3", *MOVING)


@pytest.mark.parametrize("name", ["0", "several"])
def test_beams(name):
    prompts, made = SCENES["images"].questions(), CUTS[name]
    both, asked = tiny.batch(prompts), {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    with vlmprune.patch(model(), rules(*made)):
        out = model().generate(**both, **asked)
        for row, prompt in enumerate(prompts):
            said = model().generate(**prompt, **asked, output_scores=True, return_dict_in_generate=True)
            assert out[row, -5:].tolist() == said.sequences[0, -5:].tolist()
            with torch.no_grad():
                logits = reference.run(model(), prompt, made, said.sequences[0, -5:-1].tolist()).logits
            spoken = said.sequences[0, -5:].tolist()
            total = sum(row.log_softmax(-1)[token] for row, token in zip(logits, spoken, strict=True))
            torch.testing.assert_close(said.sequences_scores[0].double() * 5, total, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["0", "2", "several"])
def test_a_later_turn_of_text_while_another_conversation_is_held(name):
    made, answer, forced = CUTS[name], random_tokens(1, 2, 1), random_tokens(1, 4, 2)
    first = prompt_of()
    turns = [conversations.with_answer(first, answer), tiny.prompt(model(), [6], [], 3)]
    want = conversations.expect(model(), turns, [made, []], forced)
    ids = torch.cat([turn["input_ids"] for turn in turns], 1)
    with vlmprune.patch(model(), rules(*made)):
        cache = DynamicCache(config=model().config.text_config)
        generated_logits(model(), first, answer, **{CACHE: cache})
        generated_logits(model(), tiny.prompt(model(), [2, "image", 2], [(90, 96)], 1), answer)
        asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        near(generated_logits(model(), asked, forced, **{CACHE: cache})[0], want)


def test_new_pictures_in_a_later_turn():
    turns, forced = conversations.turns_of(model()), random_tokens(1, 3)
    for name in ("0", "several"):
        want = conversations.expect(model(), turns, [CUTS[name]] * 3, forced)
        with torch.no_grad(), vlmprune.patch(model(), rules(*CUTS[name])):
            cache, before = DynamicCache(config=model().config.text_config), 0
            for turn in turns:
                out = conversations.by_hand(model(), turn, cache, before)
                before += turn["input_ids"].shape[1]
            logits = [out.logits[0, -1]]
            for token in forced[0].tolist():
                out = model()(input_ids=torch.tensor([[token]]), **{CACHE: cache}, use_cache=True)
                logits.append(out.logits[0, -1])
        near(torch.stack(logits), want)


def test_rows_that_go_on_with_different_lengths_are_refused():
    """Padding inside a row fades the state, unpruned as well."""
    rows = [
        [tiny.prompt(model(), [3, "image", 4], [(40, 24)], 0), tiny.prompt(model(), [5], [], 5)],
        [tiny.prompt(model(), [6, "image", 2], [(20, 70)], 1), tiny.prompt(model(), [2], [], 6)],
    ]
    with (
        vlmprune.patch(model(), rules(*CUTS["0"])),
        pytest.raises(UnsupportedError, match="fades the state of the recurrent layers"),
    ):
        conversations.converse(model(), rows, "dynamic", ["left", "left"], random_tokens(2, 3))


# Attention


def test_what_a_tap_sees_is_the_models_own_attention():
    """Gates lie between the queries of the heads: who takes them for queries is seen."""
    from vlmprune.parts import Cut, Decoder, TextAttention

    prompt = prompt_of()
    seen = {}

    class See(vlmprune.Method):
        def cuts(self, facts):
            return [Cut(Decoder(2), (TextAttention(1),), self.reduce, "original")]

        def reduce(self, given, layout):
            from vlmprune.parts import Reduction

            seen["tap"], seen["layout"] = next(iter(given.values())), layout
            return Reduction(layout.alive.clone(), list(layout.alive_counts))

    def measured():
        with torch.no_grad(), vlmprune.patch(model(), See()):
            model()(**prompt)
        return seen["tap"]

    got = measured()
    with torch.no_grad():
        x, _ = reference.embed(model(), prompt)
        place = reference.places(model(), prompt)
        x = reference.run_layer(model(), 0, x, place)
        row = reference.probabilities(model(), 1, x, place)[:, -1].mean(0)
    want = [row[seen["layout"].position[i][: grid.tokens]] for i, grid in enumerate(seen["layout"].grids)]
    for i, values in enumerate(want):
        torch.testing.assert_close(got[i, : len(values)].double(), values, rtol=1e-5, atol=1e-7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GatedRotaryLayer, "queries", NormedRotaryLayer.queries)
        assert (measured()[0, : len(want[0])].double() - want[0]).abs().max() > 1e-4


def test_layers_without_attention_are_refused_by_name():
    with pytest.raises(ValueError, match=r"that layer is recurrent, and has no attention; take one of 1, 3"):
        vlmprune.patch(model(), "fastv", keep=0.4, layer=3)
    with pytest.raises(UnsupportedError, match=r"cuts at decoder layer 1, in front of which all layers are recurrent"):
        vlmprune.patch(model(), rules(Rule(1, positions="original")))
    facts = vlmprune.patches.family_of(model()).facts(model().model)
    assert (facts.recurrent, facts.attending) == ((0, 2), (1, 3))


def test_padding_that_is_not_masked_in_recurrent_layers_is_seen(monkeypatch):
    """The twin of the batches above: a mask that is left out."""
    from vlmprune.engine import sequence

    rows = SCENES["images"].rows()
    whole = sequence.attention_mask

    def unmasked(layer, *args):
        return whole(layer, *args) if hasattr(layer, "self_attn") else None

    monkeypatch.setattr(sequence, "attention_mask", unmasked)
    with torch.no_grad(), vlmprune.patch(model(), "random", keep=0.4):
        together = with_cache(model(), tiny.batch(rows))
        alone = [with_cache(model(), row)[:, 0] for row in rows]
    assert max((together[:, i] - each).abs().max() for i, each in enumerate(alone)) > 1e-3
