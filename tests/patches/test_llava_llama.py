"""The original llava package: every method keeps what it keeps on the Hugging Face model with the same weights.

What that one computes is checked by hand in tests/methods/test_matrix.py.
"""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import original
import pytest
import reference
import tiny
import torch
from probes import Force, far, gap, random_tokens, rules, same
from probes import forced_logits as theirs_forced
from reference import Rule

import vlmprune
from vlmprune import CutNotRunError, UnsupportedError, registry
from vlmprune.patches import family_of
from vlmprune.patches.base import Bound
from vlmprune.tagged import Tagged

F64 = torch.float64
NAMES = [name for name in registry.names() if registry.find(name).training == "none"]
OPTIONS = {"todre": {"keep": 0.4, "tau": 0.35}, "transprune": {"keep": 0.3}}
FAMILIES = ["llava", "llava_next"]
PARTS, SIZES = [4, "image", 3, "image", 5], [(40, 24), (20, 70)]
MIXED = [([3, "image", 4], [(40, 24)]), ([6], []), (["image", "image", 9], [(20, 70), (24, 24)])]
GREEDY = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def pair(family):
    models = original.pair(family)
    yield models
    for model in models:
        vlmprune.unpatch(model)


def start(model, name, **more):
    return vlmprune.patch(model, name, **(OPTIONS.get(name, {"keep": 0.4}) | more))


def refused(family, name):
    return (family, name) == ("llava", "globalcom2")


def generate(model, inputs, **options):
    given = dict(inputs)
    return model.generate(given.pop("input_ids"), **given, **GREEDY, **options)


@torch.no_grad()
def test_unpatched_it_computes_what_its_twin_computes(pair):
    model, twin = pair
    ours, theirs = original.prompt(twin, PARTS, SIZES)
    same(model(**ours).logits, twin(**theirs).logits, 1e-12)
    length = theirs["input_ids"].shape[1]
    assert torch.equal(generate(model, ours), twin.generate(**theirs, **GREEDY)[:, length:])


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
    assert torch.equal(generate(model, ours), twin.generate(**theirs, **GREEDY)[:, length:])


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
        out = generate(model, inputs, num_beams=beams)
        for row, (_, theirs) in enumerate(both):
            want = twin.generate(**theirs, **GREEDY, num_beams=beams)[0, theirs["input_ids"].shape[1] :]
            assert out[row].tolist() == want.tolist()
    vlmprune.unpatch(model)
    assert torch.equal(model(**inputs).logits, before)
    assert vars(model).keys() == modules
    for module in model.modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        assert not any(vlmprune.engine.is_hook(hook) for hook in hooks)
        assert not any(isinstance(value, Bound) for value in vars(module).values())


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


@pytest.mark.parametrize("size", [(40, 24), (24, 40), (20, 70), (70, 20), (24, 24), (100, 90), (1, 60), (37, 53)])
def test_layouts_are_those_of_the_twin(size):
    model, twin = original.pair("llava_next")
    height, width = size
    views, _ = family_of(twin).grid(twin.model, size)
    got = family_of(model).image_grid(model.model, (True, views, (width, height)))
    want = family_of(twin).image_grid(twin.model, size)
    for name, value in vars(want).items():
        mine = getattr(got, name)
        assert torch.equal(mine, value) if isinstance(value, torch.Tensor) else mine == value, name


def variant(family="llava_next", side="left", **config):
    """A copy of the original with other packing."""
    made = copy.deepcopy(original.pair(family, side=side)[0])
    for name, value in config.items():
        setattr(made.config, name, value)
    return made


@pytest.mark.parametrize(
    ("config", "pictures", "tokens", "newlines"),
    [
        ({}, lambda x: x[0][:1], 16, 0),  # a plain batch of pictures is not packed
        ({}, lambda x: [x[0][0]], 17, 1),  # a list of single views is
        ({}, lambda x: x[0][None], 16 + 32 + 8, 8),
        ({"mm_patch_merge_type": "spatial"}, lambda x: x, 16 + 32, 0),
        ({"mm_patch_merge_type": "flat"}, lambda x: [x[0][0]], 16, 0),
        ({"image_grid_pinpoints": "[[24, 48]]"}, lambda x: x, 16 + 32 + 8, 8),
    ],
)
@torch.no_grad()
def test_every_packing_of_the_host_is_traced(config, pictures, tokens, newlines):
    model = variant(**config)
    _, twin = original.pair("llava_next")
    inputs, _ = original.prompt(twin, [3, "image", 4], [(48, 24)])
    inputs["images"] = pictures(inputs["images"])
    handle = vlmprune.patch(model, "vtc_cls", keep=8)
    assert model(**inputs).logits.shape[1] == 7 + tokens
    (grid,) = handle.trace.grids
    assert (grid.tokens, grid.newlines) == (tokens, newlines)
    assert handle.trace.kv_lengths == [7 + 8 + newlines] * tiny.LAYERS


@torch.no_grad()
def test_flat_views_of_one_picture_are_refused():
    model = variant(mm_patch_merge_type="flat")
    inputs, _ = original.prompt(original.pair("llava_next")[1], [3, "image", 4], [(48, 24)])
    vlmprune.patch(model, "vtc_cls", keep=8)
    with pytest.raises(UnsupportedError, match="'flat' with 3 views of one image"):
        model(**inputs)


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
        assert torch.equal(generate(model, ours), twin.generate(**theirs, **GREEDY)[:, length:])
    finally:
        vlmprune.unpatch(model)
        vlmprune.unpatch(twin)


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
    "cls": (lambda: without(variant("llava"), ("select_feature", "cls_patch")), "mm_vision_select_feature='cls_patch'"),
    "s2": (lambda: variant("llava", s2=True), "needs its CLIP tower"),
}


@pytest.mark.parametrize(("build", "told"), REFUSALS.values(), ids=REFUSALS)
def test_models_that_are_refused(build, told):
    model = build()
    with pytest.raises(UnsupportedError, match=told):
        vlmprune.patch(model, "random", keep=4)
    assert not any(vlmprune.engine.is_hook(h) for m in model.modules() for h in m._forward_pre_hooks.values())


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
    cache = model(**ours, use_cache=True).past_key_values
    with pytest.raises(UnsupportedError, match=r"the whole conversation .* comes again"):
        model(**ours, past_key_values=cache)  # the host makes a mask of the new tokens alone
    with pytest.raises(UnsupportedError, match=r"one piece.*new tokens and images alone"):
        generate(model, ours, past_key_values=cache)


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
            caches[i], got[i] = out.past_key_values, out.logits[0, -1]
    same(*got)
    assert handles[0].trace.kept() == handles[1].trace.kept()
    assert [caches[0].get_seq_length(k) for k in range(4)] == [caches[1].get_seq_length(k) for k in range(4)]
    far(got[0], model(**turns[1][0]).logits[0, -1])


@torch.no_grad()
def test_a_prompt_cut_off_in_a_picture_is_refused():
    model = variant("llava", side="right", tokenizer_model_max_length=14)
    inputs, _ = original.prompt(original.pair()[1], [4, "image", 5], [(24, 24)])
    assert model(**inputs).logits.shape[1] == 14
    vlmprune.patch(model, "random", keep=4)
    with pytest.raises(ValueError, match="prompt 0 has 10 image placeholders and its images have 16 tokens"):
        model(**inputs)


@torch.no_grad()
def test_disabled_is_the_plain_model(pair):
    model, twin = pair
    ours, _ = original.prompt(twin, PARTS, SIZES)
    plain, answer = model(**ours).logits, generate(model, ours)
    handle = vlmprune.patch(model, "fopru", keep=4)
    far(model(**ours).logits, plain)
    with handle.disabled():
        assert torch.equal(model(**ours).logits, plain)
        assert torch.equal(generate(model, ours), answer)
    text = {"input_ids": ours["input_ids"].abs() % 60}
    trace = handle.trace
    pruned = model(**text).logits
    vlmprune.unpatch(model)
    assert torch.equal(pruned, model(**text).logits)
    assert handle.trace is trace


@torch.no_grad()
def test_prepared_embeddings_carry_their_layout(pair):
    model, twin = pair
    ours, _ = original.prompt(twin, PARTS, SIZES)
    handle = vlmprune.patch(model, "vtc_cls", keep=4)
    want = model(**ours).logits
    _, _, mask, _, embeds, _ = model.prepare_inputs_labels_for_multimodal(
        ours["input_ids"], None, ours["attention_mask"], None, None, ours["images"], ours.get("image_sizes")
    )
    handle._plan.trace = None
    assert torch.equal(model(inputs_embeds=embeds.clone(), attention_mask=mask).logits, want)
    assert handle.trace is not None


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


@pytest.mark.parametrize("given", [(), ("mask",), ("mask", "positions", "labels"), ("labels",)])
@torch.no_grad()
def test_prompts_are_expanded_as_the_host_expands_them(pair, given):
    model, twin = pair
    inputs = original.batch([original.prompt(twin, *p)[0] for p in ((PARTS, SIZES), ([7, "image"], SIZES[:1]))])
    inputs["input_ids"][1, 0] = original.IMAGE  # in the padding: no image unless there is no mask
    if "mask" not in given:
        inputs["images"] = [*inputs["images"], inputs["images"][0]]
        inputs["image_sizes"] = [*inputs.get("image_sizes", SIZES), SIZES[0][::-1]]
    kwargs = {
        "input_ids": inputs["input_ids"],
        "position_ids": torch.zeros_like(inputs["input_ids"]) if "positions" in given else None,
        "attention_mask": inputs["attention_mask"] if "mask" in given else None,
        "past_key_values": None,
        "labels": inputs["input_ids"] + 1 if "labels" in given else None,
        "images": inputs["images"],
        "image_sizes": inputs.get("image_sizes"),
    }
    want = model.prepare_inputs_labels_for_multimodal(**kwargs)
    plain = model(**{k: v for k, v in kwargs.items() if k != "labels"}).logits
    handle = vlmprune.patch(model, "random", keep=1.0)
    for mine, theirs in zip(model.prepare_inputs_labels_for_multimodal(**kwargs), want, strict=True):
        assert mine is theirs is None or (torch.equal(mine, theirs) and mine.dtype == theirs.dtype)
    assert torch.equal(model(**{k: v for k, v in kwargs.items() if k != "labels"}).logits, plain)
    assert handle.trace.sample == ([0, 0, 1] if "mask" in given else [0, 0, 1, 1])


@pytest.mark.parametrize("disabled", [False, True])
@torch.no_grad()
def test_no_part_of_the_model_computes_with_tagged_tensors(pair, disabled):
    model, twin = pair
    ours, _ = original.prompt(twin, PARTS, SIZES)
    handle, ran, hooks = vlmprune.patch(model, "vtc_cls", keep=4), [], []

    def check(module, args, kwargs, output):
        ran.append(module)
        assert not any(isinstance(x, Tagged) for x in (*args, *kwargs.values(), output))

    for name, module in model.named_modules():
        if name not in ("", "model", "model.vision_tower", "model.vision_tower.vision_tower"):
            hooks.append(module.register_forward_hook(check, with_kwargs=True))
    try:
        with handle.disabled() if disabled else nullcontext():
            model(**ours)
            generate(model, ours)
    finally:
        for hook in hooks:
            hook.remove()
    assert {type(module).__name__ for module in ran} >= {"CLIPEncoderLayer", "LlamaDecoderLayer", "Linear"}


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
