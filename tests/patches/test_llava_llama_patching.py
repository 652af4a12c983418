"""Patching models of the original llava package: which can be, which calls they refuse, and what it leaves alone."""

from __future__ import annotations

import copy
import pickle

import leftovers
import original
import pytest
import torch
from original import PARTS, SIZES
from probes import far, gap
from tiny import CACHE

import vlmprune
from vlmprune import CutNotRunError, UnsupportedError
from vlmprune.patches import family_of


def test_facts(family):
    model, twin = original.pair(family)
    found = family_of(model)
    facts, theirs = found.facts(found.inner(model)), family_of(twin).facts(twin.model)
    assert facts.family == found.model_type == "llava_llama"
    assert {k: v for k, v in vars(facts).items() if k != "family"} == {
        k: v for k, v in vars(theirs).items() if k != "family"
    }


def without(model, name):
    setattr(model.get_vision_tower(), *name)
    return model


REFUSALS = {
    "inner": (lambda: original.pair()[0].model, "give the whole model of the llava package"),
    "not loaded": (lambda: original.model(original.pair()[1], load=False), r"load_model\(\) first"),
    "cls": (
        lambda: without(original.variant("llava"), ("select_feature", "cls_patch")),
        "mm_vision_select_feature='cls_patch'",
    ),
    "s2": (lambda: original.variant("llava", s2=True), "needs its CLIP tower"),
}


@pytest.mark.parametrize(("build", "told"), REFUSALS.values(), ids=REFUSALS)
def test_models_that_are_refused(build, told):
    model = build()
    with pytest.raises(UnsupportedError, match=told):
        vlmprune.patch(model, "random", keep=4)
    assert not leftovers.ours(model)


@torch.no_grad()
def test_calls_that_are_refused(pair):
    model, twin = pair
    ours, _ = original.prompt(twin, PARTS, SIZES)
    handle = vlmprune.patch(model, "vtc_cls", keep=4)

    def embeds():
        return model.prepare_inputs_labels_for_multimodal(
            ours["input_ids"], None, None, None, None, ours["images"], ours.get("image_sizes")
        )[4]

    with handle.disabled():
        unseen = embeds()
    with pytest.raises(CutNotRunError, match="computed by an unpatched model or while the patch was disabled"):
        model(inputs_embeds=unseen)
    with pytest.raises(UnsupportedError, match="must run in one piece"):
        model(inputs_embeds=torch.cat((embeds(), embeds()[:, :3]), 1))
    with pytest.raises(UnsupportedError, match="output_attentions"):
        model(**ours, output_attentions=True)
    with pytest.raises(ValueError, match="prompt 0 has 2 images, and only 1"):
        model(**ours | {"images": ours["images"][:1]})
    cache = model(**ours, use_cache=True)[CACHE]
    with pytest.raises(UnsupportedError, match=r"the whole conversation .* comes again"):
        model(**ours, past_key_values=cache)  # the host makes a mask of the new tokens alone
    # since transformers 5.24 the host's own `generate` takes no cache
    words = r"one piece.*new tokens and images alone" if CACHE == "past_key_values" else "not used by the model"
    with pytest.raises((UnsupportedError, ValueError), match=words):
        original.generate(model, ours, past_key_values=cache)


@torch.no_grad()
def test_disabled_is_the_plain_model(pair):
    model, twin = pair
    ours, _ = original.prompt(twin, PARTS, SIZES)
    plain, answer = model(**ours).logits, original.generate(model, ours)
    handle = vlmprune.patch(model, "fopru", keep=4)
    far(model(**ours).logits, plain)
    with handle.disabled():
        assert torch.equal(model(**ours).logits, plain)
        assert torch.equal(original.generate(model, ours), answer)
    text = {"input_ids": ours["input_ids"].abs() % 60}
    trace = handle.trace
    pruned = model(**text).logits
    vlmprune.unpatch(model)
    assert torch.equal(pruned, model(**text).logits)
    assert handle.trace is trace


@torch.no_grad()
def test_copies_and_pickles_of_a_patched_model(pair):
    model, twin = original.model(pair[1]), pair[1]
    ours, _ = original.prompt(twin, PARTS, SIZES)
    vlmprune.patch(model, "vtc_cls", keep=4)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))  # before transformers' hooks come at the first run
    plain, want = pair[0](**ours).logits, model(**ours).logits
    far(want, plain)
    for made in copies:
        assert made.prepare_inputs_labels_for_multimodal.model is made
        assert torch.equal(made(**ours).logits, want)
        vlmprune.unpatch(made)
        assert torch.equal(made(**ours).logits, plain)
    assert gap(model(**ours).logits, want) == 0


@torch.no_grad()
def test_two_models_and_no_class_touched(pair):
    model, twin = pair
    other = copy.deepcopy(model)
    ours, _ = original.prompt(twin, PARTS, SIZES)
    plain, before = model(**ours).logits, {cls: dict(vars(cls)) for cls in type(model).__mro__}
    one, two = vlmprune.patch(model, "vtc_cls", keep=4), vlmprune.patch(other, "fopru", keep=7)
    model(**ours), other(**ours)
    assert one.trace.kv_lengths != two.trace.kv_lengths
    assert before == {cls: dict(vars(cls)) for cls in type(model).__mro__}
    vlmprune.unpatch(model)
    assert torch.equal(model(**ours).logits, plain)
    far(other(**ours).logits, plain)
