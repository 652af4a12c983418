"""The original llava package: every method keeps what it keeps on the Hugging Face model with the same weights.

What that one computes is checked by hand in tests/methods/test_matrix.py.
"""

from __future__ import annotations

import leftovers
import original
import pytest
import reference
import tiny
import torch
from original import GREEDY, PARTS, SIZES
from probes import Force, far, random_tokens, rules, same
from probes import forced_logits as theirs_forced
from reference import Rule
from scenes import CROPS, STILL
from tiny import CACHE

import vlmprune
from vlmprune import UnsupportedError, registry
from vlmprune.patches import family_of

NAMES = [name for name in STILL if registry.find(name).training == "none"]
OPTIONS = {"todre": {"keep": 0.4, "tau": 0.35}, "transprune": {"keep": 0.3}}
OPTIONS["cdpruner"] = {"keep": 0.4, "relevance": "embeddings"}
MIXED = [([3, "image", 4], [(40, 24)]), ([6], []), (["image", "image", 9], [(20, 70), (24, 24)])]


def start(model, name, **more):
    return vlmprune.patch(model, name, **(OPTIONS.get(name, {"keep": 0.4}) | more))


def refused(family, name):
    return family == "llava" and name in CROPS


@torch.no_grad()
def test_unpatched_it_computes_what_its_twin_computes(pair):
    model, twin = pair
    ours, theirs = original.prompt(twin, PARTS, SIZES)
    same(model(**ours).logits, twin(**theirs).logits, 1e-12)
    length = theirs["input_ids"].shape[1]
    assert torch.equal(original.generate(model, ours), twin.generate(**theirs, **GREEDY)[:, length:])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_it_keeps_and_computes_what_its_twin_does(pair, family, name, support):
    model, twin = pair
    ours, theirs = original.prompt(twin, PARTS, SIZES)
    length, forced = theirs["input_ids"].shape[1], random_tokens(1, 4)
    plain = model(**ours).logits
    if refused(family, name):
        with pytest.raises(UnsupportedError, match="have a single view"):
            start(model, name)
        return
    support("exact", model, name)
    handle, twins = start(model, name), start(twin, name)
    same(original.forced_logits(model, ours, [length], forced), theirs_forced(twin, theirs, forced))
    got, want = handle.trace, twins.trace
    assert (got.kv_lengths, got.prompt_lengths, got.sample) == (want.kv_lengths, [length], want.sample)
    assert [(cut.layer, cut.method, cut.positions) for cut in got.cuts] == [
        (cut.layer, cut.method, cut.positions) for cut in want.cuts
    ]
    assert all(torch.equal(a.keep, b.keep) for a, b in zip(got.cuts, want.cuts, strict=True))
    assert got.cuts or name == "downsample"
    far(model(**ours).logits, plain)
    assert torch.equal(original.generate(model, ours), twin.generate(**theirs, **GREEDY)[:, length:])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_row_of_a_batch_is_the_sample_alone(family, name, side, support):
    if refused(family, name):
        return
    model, twin = original.pair(family, side=side)
    support("right padding" if side == "right" else "batches", model, name)
    both = [original.prompt(twin, *mixed, seed=seed) for seed, mixed in enumerate(MIXED)]
    lengths, forced = [theirs["input_ids"].shape[1] for _, theirs in both], random_tokens(3, 3)
    try:
        start(model, name)
        together = original.forced_logits(model, original.batch([ours for ours, _ in both], side), lengths, forced)
        for row, (ours, _) in enumerate(both):
            alone = original.forced_logits(model, ours, lengths[row : row + 1], forced[row : row + 1])
            same(together[row], alone[0])
    finally:
        vlmprune.unpatch(model)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_beams_and_unpatching(pair, family, name, support):
    if refused(family, name):
        return
    model, twin = pair
    support("beam search", model, name)
    support("unpatching", model, name)
    both = [original.prompt(twin, *mixed, seed=seed) for seed, mixed in enumerate(MIXED)]
    inputs = original.batch([ours for ours, _ in both])
    before, modules = model(**inputs).logits, vars(model).keys()
    start(model, name)
    start(twin, name)
    for beams in (1, 3):
        out = original.generate(model, inputs, num_beams=beams)
        for row, (_, theirs) in enumerate(both):
            want = twin.generate(**theirs, **GREEDY, num_beams=beams)[0, theirs["input_ids"].shape[1] :]
            assert out[row].tolist() == want.tolist()
    vlmprune.unpatch(model)
    assert torch.equal(model(**inputs).logits, before)
    assert vars(model).keys() == modules
    assert not leftovers.ours(model)


CUTS = {
    "before the LLM": [Rule(0)],
    "inside": [Rule(2, positions="original")],
    "merging, then inside": [Rule(0, merge=True), Rule(3, mod=2)],
    "all": [Rule(0, rest=0)],
}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@torch.no_grad()
def test_by_hand(pair, cuts):
    model, twin = pair
    ours, theirs = original.prompt(twin, PARTS, SIZES)
    forced = random_tokens(1, 3)
    want = reference.run(twin, theirs, cuts, forced[0].tolist())
    handle = vlmprune.patch(model, rules(*cuts))
    got = original.forced_logits(model, ours, [theirs["input_ids"].shape[1]], forced)[0]
    same(got, want.logits)
    assert handle.trace.kv_lengths == want.kv_lengths
    twins = [reference.other_positions(cuts), *([] if cuts[0].rest == 0 else [reference.wrong(cuts)])]
    for other in twins:
        far(got, reference.run(twin, theirs, other, forced[0].tolist()).logits)


@pytest.mark.parametrize("cache", ["static", "dynamic"])
@torch.no_grad()
def test_generate_decodes_with_the_logits_of_the_reference(pair, cache):
    model, twin = pair
    ours, theirs = original.prompt(twin, PARTS, SIZES)
    cuts, forced = [Rule(0), Rule(2, mod=2, positions="original")], random_tokens(1, 4)
    want = reference.run(twin, theirs, cuts, forced[0].tolist()).logits
    vlmprune.patch(model, rules(*cuts))
    logits, steps = [], torch.cat((forced, forced[:, :1]), 1)
    hook = model.lm_head.register_forward_hook(lambda module, args, output: logits.append(output[0, -1]))
    try:  # `generate` starts from embeddings alone: no prompt token stands before the new ones
        model.generate(
            ours["input_ids"], images=ours["images"], image_sizes=ours.get("image_sizes"), do_sample=False,
            max_new_tokens=5, logits_processor=[Force(steps, 0)], cache_implementation=cache, disable_compile=True,
        )  # fmt: skip
    finally:
        hook.remove()
    same(torch.stack(logits), want)


@pytest.mark.parametrize("name", ["fopru", "fastv", "todre", "tome"])
@torch.no_grad()
def test_a_second_turn_is_that_of_its_twin(pair, name, support):
    """`generate` of this host cannot go on with images: calls of the model can, without a mask."""
    model, twin = pair
    support("second turn, new image", model, name)
    turns = [original.prompt(twin, PARTS, SIZES), original.prompt(twin, [2, "image", 4], [(24, 24)], seed=1)]
    caches, got = [None, None], [None, None]
    handles = [start(m, name) for m in pair]
    for turn in turns:
        for i, m in enumerate(pair):
            out = m(**(turn[i] | {"attention_mask": None}), past_key_values=caches[i], use_cache=True)
            caches[i], got[i] = out[CACHE], out.logits[0, -1]
    same(*got)
    assert handles[0].trace.kept() == handles[1].trace.kept()
    assert [caches[0].get_seq_length(k) for k in range(4)] == [caches[1].get_seq_length(k) for k in range(4)]
    far(got[0], model(**turns[1][0]).logits[0, -1])


def test_loss_and_labels(pair):
    model, twin = pair
    both = [original.prompt(twin, *mixed, seed=seed) for seed, mixed in enumerate(MIXED)]
    inputs = original.batch([ours for ours, _ in both])
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[labels == original.IMAGE] = -100
    labels[:, -3] = -100
    want = model(**inputs, labels=labels).loss
    vlmprune.patch(model, "random", keep=1.0)  # the identity, through all that stands in between
    assert torch.equal(model(**inputs, labels=labels).loss, want)
    vlmprune.patch(model, "random", keep=4)
    loss = model(**inputs, labels=labels).loss
    far(loss, want)
    loss.backward()
    assert model.model.mm_projector[0].weight.grad.abs().max() > 0
    model.zero_grad()


@pytest.mark.parametrize("name", ["vtc_cls", "fastv", "transprune"])
@torch.no_grad()
def test_mistral_with_a_sliding_window(name):
    model, twin = original.pair("llava_next", text="mistral", sliding_window=24)
    ours, theirs = original.prompt(twin, PARTS, SIZES)
    length, forced = theirs["input_ids"].shape[1], random_tokens(1, 4)
    assert family_of(model).model_type == model.config.model_type == "llava_mistral"
    same(model(**ours).logits, twin(**theirs).logits, 1e-12)
    try:
        handle, twins = start(model, name), start(twin, name)
        same(original.forced_logits(model, ours, [length], forced), theirs_forced(twin, theirs, forced))
        assert torch.equal(handle.trace.cuts[0].keep, twins.trace.cuts[0].keep)
        assert torch.equal(original.generate(model, ours), twin.generate(**theirs, **GREEDY)[:, length:])
    finally:
        vlmprune.unpatch(model)
        vlmprune.unpatch(twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_other_dtypes(dtype):
    twin = tiny.shared(dtype=dtype)
    model = original.model(twin)
    ours, theirs = original.prompt(twin, PARTS, SIZES)
    for kind in (model, twin):
        vlmprune.patch(kind, "fastv", keep=6)
    same(model(**ours).logits, twin(**theirs).logits, 5e-7 if dtype == torch.float32 else 0.0)
    vlmprune.unpatch(twin)
