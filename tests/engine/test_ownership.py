"""Whose patch is on a model: blocks inside blocks, stale handles, patches that fail, parts that models share."""

from __future__ import annotations

import copy
import itertools
import pickle
from contextlib import ExitStack

import pytest
import tiny
import torch
from leftovers import assert_clean, ours
from probes import far

import vlmprune
from vlmprune import CutNotRunError
from vlmprune.engine import install as engine


def prompt_of(model):
    return tiny.prompt(model, [4, "image", 6], [(40, 24)])


@torch.no_grad()
def logits(model, prompt):
    return model(**prompt).logits


def on(model):
    """Seed of the random patch that is on a model, by its hooks; None where there is none."""
    found = {id(hook.plan): hook.plan.methods[0].seed for hook in ours(model)}
    assert len(found) <= 1, "hooks of two patches"
    return next(iter(found.values()), None)


# Orders


STEPS = ("patch", "with", "leave", "unpatch", "fail")


@pytest.mark.parametrize("first", STEPS)
def test_leaving_a_block_makes_the_model_what_it_was_before(first):
    """Every order, against the rule itself: a stack of what was on the model when each block's patch was made."""
    model = tiny.shared()
    for steps in itertools.product(STEPS, repeat=2):
        want, saved, blocks = None, [], []
        for seed, step in enumerate(["patch", "with", first, *steps, "leave", "leave", "leave"]):
            if step == "patch":
                vlmprune.patch(model, "random", keep=3, seed=seed)
                want = seed
            elif step == "with":
                blocks.append(vlmprune.patch(model, "random", keep=3, seed=seed).__enter__())
                saved.append(want)
                want = seed
            elif step == "unpatch":
                vlmprune.unpatch(model)
                want = None
            elif saved:
                error = (ValueError, ValueError("of the user"), None) if step == "fail" else (None, None, None)
                assert not blocks.pop().__exit__(*error), "swallows the user's error"
                want = saved.pop()
            assert on(model) == want, steps
        vlmprune.unpatch(model)
        assert_clean(model)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_the_outer_patch_prunes_again(tiny_model, family):
    model = tiny_model(family=family)
    prompt = prompt_of(model)
    plain = logits(model, prompt)
    with vlmprune.patch(model, "fopru", keep=3) as outer:
        want = logits(model, prompt)
        with pytest.raises(KeyError), vlmprune.patch(model, "random", keep=3):  # noqa: PT012
            far(logits(model, prompt), want, 1e-6)
            raise KeyError
        before = outer.trace
        assert torch.equal(logits(model, prompt), want)
        assert outer.trace is not before
        with outer.disabled():
            assert torch.equal(logits(model, prompt), plain)
    assert_clean(model)
    assert torch.equal(logits(model, prompt), plain)


def test_blocks_that_are_not_left_in_order(tiny_model):
    model = tiny_model()
    a, b, c = [vlmprune.patch(model, "random", keep=3, seed=seed).__enter__() for seed in (1, 2, 3)]
    a.__exit__(None, None, None)
    assert on(model) == 3
    c.__exit__(None, None, None)
    assert on(model) == 2
    b.__exit__(None, None, None)
    assert_clean(model)


def test_stale_handles_say_so(tiny_model):
    model = tiny_model()
    a = vlmprune.patch(model, "random", keep=3, seed=1)
    b = vlmprune.patch(model, "random", keep=3, seed=2)
    for use in (a.unpatch, a.__enter__, lambda: a.disabled().__enter__()):
        with pytest.raises(RuntimeError, match="no longer on the model"):
            use()
        assert on(model) == 2
    with b:
        with pytest.raises(RuntimeError, match="entered once"), b:
            pass
        assert on(model) == 2
    assert on(model) == 1  # b's block is over: the model is as it was before b
    assert a.unpatch() is model
    with pytest.raises(RuntimeError, match="no longer on the model"):
        a.unpatch()
    assert_clean(model)


def test_patching_again_and_again_holds_no_chain_of_old_patches(tiny_model):
    model = tiny_model()
    with vlmprune.patch(model, "random", keep=3, seed=0):
        for seed in range(1, 30):
            handle = vlmprune.patch(model, "random", keep=3, seed=seed)
        chain, plan = 0, handle._plan
        while (plan := plan.before) is not None:
            chain += 1
        assert chain == 2  # the one before, and the open block's
    assert_clean(model)


# Patches that fail


@pytest.mark.parametrize("before", ["fopru", None])
@pytest.mark.parametrize(
    ("part", "name", "method", "options"),
    [
        ("language_model.layers.2", "mlp", "transprune", {"prune_layers": (24,), "keep_ratios": (0.5,)}),
        ("vision_tower.encoder.layers.2.self_attn", "k_proj", "tome", {"keep": 0.5}),
    ],
)
def test_a_patch_that_fails_half_way_leaves_what_was_there(before, part, name, method, options):
    model = tiny.model(family="llava_next")
    prompt = prompt_of(model)
    earlier = vlmprune.patch(model, before, keep=3) if before else None
    want, hooks = logits(model, prompt), len(ours(model))
    part = model.model.get_submodule(part)
    missing = part._modules.pop(name)
    with pytest.raises(AttributeError):
        vlmprune.patch(model, method, **options)
    part._modules[name] = missing
    assert len(ours(model)) == hooks
    assert torch.equal(logits(model, prompt), want)
    if earlier is not None:
        earlier.unpatch()
    assert_clean(model)


def test_ctrl_c_while_patching(tiny_model, monkeypatch):
    """Wherever it falls."""
    model = tiny_model()
    vlmprune.patch(model, "random", keep=3, seed=7)
    put = torch.nn.Module.register_forward_pre_hook
    for limit in range(1 + 6 + 1 + 4 + 1):  # tower and its layers, the inner model and its layers, the model
        left = iter([True] * limit + [False])

        def interrupted(module, hook, left=left, **options):
            if not next(left, True):
                raise KeyboardInterrupt
            return put(module, hook, **options)

        with monkeypatch.context() as patched:
            patched.setattr(torch.nn.Module, "register_forward_pre_hook", interrupted)
            with pytest.raises(KeyboardInterrupt):
                vlmprune.patch(model, "vtc_cls", keep=3)
        assert on(model) == 7


# Shared parts

TOWER = {"downsample": {"keep": 0.1}, "tome": {"keep": 0.5}, "vtc_cls": {"keep": 3}, "random": {"keep": 3}}
DECODER = {
    "transprune": {"prune_layers": (16, 24), "keep_ratios": (0.6, 0.3)},
    "fastv": {"keep": 3},
    "random": {"keep": 3},
}


def pair(part, family="llava"):
    """Two models of which one has the other's vision tower or language model."""
    a, b = tiny.model(family, seed=1), tiny.model(family, seed=2)
    setattr(b.model, part, getattr(a.model, part))
    return a, b


def neighbours(part, methods):
    """All pairs of methods, and each beside none; each pair once in every run, the other way round in all of them."""
    names = list(methods)
    for first, second in itertools.product(names, [*names, None]):
        again = second is not None and names.index(first) > names.index(second)
        yield pytest.param(part, first, second, marks=[pytest.mark.exhaustive] * again)


@pytest.mark.parametrize(
    ("part", "first", "second"), [*neighbours("vision_tower", TOWER), *neighbours("language_model", DECODER)]
)
def test_a_patch_acts_in_its_own_models_calls(part, first, second):
    options = TOWER | DECODER
    a, b = pair(part)
    prompt = prompt_of(a)
    plain = [logits(model, prompt) for model in (a, b)]
    alone = []
    for model, name in ((a, first), (b, second)):
        if name is None:
            alone.append(plain[1])
        else:
            with vlmprune.patch(model, name, **options[name]):
                alone.append(logits(model, prompt))
            far(alone[-1], plain[len(alone) - 1], 1e-6)
    for order in ((0, 1), (1, 0)):
        handles = {}
        for number in order:
            if (name := (first, second)[number]) is not None:
                handles[number] = vlmprune.patch((a, b)[number], name, **options[name])
        for _ in range(2):
            assert torch.equal(logits(a, prompt), alone[0])
            assert torch.equal(logits(b, prompt), alone[1])
        generated = [model.generate(**prompt, max_new_tokens=3, do_sample=False) for model in (a, b)]
        vlmprune.unpatch((a, b)[order[0]])
        want = [alone[0], alone[1]]
        want[order[0]] = plain[order[0]]
        assert torch.equal(logits(a, prompt), want[0])
        assert torch.equal(logits(b, prompt), want[1])
        other = 1 - order[0]
        assert torch.equal((a, b)[other].generate(**prompt, max_new_tokens=3, do_sample=False), generated[other])
        if other in handles:
            handles[other].unpatch()
        assert_clean(a)
        assert_clean(b)
    assert torch.equal(logits(a, prompt), plain[0])


@pytest.mark.parametrize("method", ["downsample", "vtc_cls"])
def test_copies_of_models_that_share_a_tower(method):
    a, b = pair("vision_tower")
    vlmprune.patch(a, method, **TOWER[method])
    fresh = pickle.dumps([a, b])  # before a forward pass, which leaves hooks of transformers that do not pickle
    prompt = prompt_of(a)
    plain, want = logits(b, prompt), logits(a, prompt)
    assert torch.equal(plain, logits(pair("vision_tower")[1], prompt))
    for twin_a, twin_b in (copy.deepcopy([a, b]), pickle.loads(fresh)):
        assert twin_b.model.vision_tower is twin_a.model.vision_tower
        assert torch.equal(logits(twin_a, prompt), want)
        assert torch.equal(logits(twin_b, prompt), plain)
        vlmprune.unpatch(twin_b)  # nothing of its own
        assert torch.equal(logits(twin_a, prompt), want)
        vlmprune.unpatch(twin_a)
        assert_clean(twin_b)
        assert torch.equal(logits(a, prompt), want)


def test_copies_are_no_part_of_the_block(tiny_model):
    model = tiny_model()
    with vlmprune.patch(model, "random", keep=3, seed=1), vlmprune.patch(model, "random", keep=3, seed=2):
        twin = copy.deepcopy(model)
    assert_clean(model)
    assert on(twin) == 2
    with vlmprune.patch(twin, "random", keep=3, seed=3):
        assert on(twin) == 3
    assert on(twin) == 2
    assert_clean(vlmprune.unpatch(twin))


def test_the_inner_part_of_a_patched_model_is_refused_by_name(tiny_model):
    model, other = tiny_model(), tiny.model(seed=2)
    prompt = prompt_of(model)
    handle = vlmprune.patch(model, "random", keep=3)
    want, mine, other.model = logits(model, prompt), other.model, model.model
    for act in (lambda x: vlmprune.patch(x, "fopru", keep=3), vlmprune.unpatch):
        for part in (model.model, other):
            with pytest.raises(RuntimeError, match="inner part of a LlavaForConditionalGeneration that is patched"):
                act(part)
    assert torch.equal(logits(model, prompt), want)
    other.model = mine
    handle.unpatch()
    # the other way round it is one model, patched anew
    vlmprune.patch(model.model, "random", keep=3)
    with vlmprune.patch(model, "fopru", keep=3) as handle:
        logits(model, prompt)
        assert handle.trace.cuts[0].method == "fopru"
    vlmprune.unpatch(model.model)
    assert_clean(model)


def test_a_container_of_patched_models():
    both = torch.nn.ModuleList([tiny.model(seed=1), tiny.model(seed=2)])
    with ExitStack() as stack:
        for model in both:
            stack.enter_context(vlmprune.patch(model, "random", keep=3))
        assert len(engine.owned(both)) == 2
        vlmprune.unpatch(both)
        assert_clean(both)


@pytest.mark.parametrize("method", ["downsample", "tome"])
@torch.no_grad()
def test_features_that_lack_what_the_patch_does_in_front_of_the_model(tiny_model, method):
    """Of another patch of the same kind, of the plain model, and of the plain model inside `disabled`."""
    model = tiny_model()
    prompt = prompt_of(model)
    rest = {name: value for name, value in prompt.items() if name != "pixel_values"}

    def encoded():
        return rest | {
            "mm_encoder_outputs": {"image": model.get_image_features(prompt["pixel_values"], return_dict=True)}
        }

    made = [encoded()]
    with vlmprune.patch(model, method, keep=0.75):
        made.append(encoded())
    with vlmprune.patch(model, method, keep=0.5) as handle:
        with handle.disabled():
            made.append(encoded())
        for given in made:
            with pytest.raises(CutNotRunError, match="features"):
                model(**given)
        assert torch.equal(model(**encoded()).logits, model(**prompt).logits)


# Adapters


ADAPTED = r".*language_model.*(q_proj|v_proj)|.*vision_tower.*k_proj"


def with_adapter(model, targets=ADAPTED):
    peft = pytest.importorskip("peft", reason="peft is not installed (make install does)")
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


@pytest.mark.parametrize("method", ["tome", "fastv"])
def test_adapters_on_models_that_share_a_tower(method):
    """The second one's goes into the tower of both; each model is what it is when patched anew."""
    one, two = tiny.model(), tiny.model()
    two.model.vision_tower = one.model.vision_tower
    prompt = prompt_of(one)
    first = with_adapter(one)
    vlmprune.patch(first, method, keep=4)
    vlmprune.patch(two, "fopru", keep=5)
    before = logits(first, prompt), logits(two, prompt)
    second = with_adapter(two, r".*language_model.*(q_proj|v_proj)")
    assert torch.equal(logits(first, prompt), before[0])
    far(logits(second, prompt), before[1])
    for model, name, keep in ((first, method, 4), (second, "fopru", 5)):
        got = logits(model, prompt)
        vlmprune.unpatch(model)
        far(logits(model, prompt), got)
        vlmprune.patch(model, name, keep=keep)
        assert torch.equal(logits(model, prompt), got)


def test_two_adapters_around_one_model_are_one_patch():
    model = tiny.model()
    prompt = prompt_of(model)
    first = with_adapter(model)
    first.add_adapter("other", first.peft_config["default"])
    handle = vlmprune.patch(first, "tome", keep=4)
    one = logits(first, prompt)
    first.set_adapter("other")
    far(logits(first, prompt), one)
    first.set_adapter("default")
    assert torch.equal(logits(first, prompt), one)
    # whichever of the wrapped and the bare model is patched, it is the same patch
    vlmprune.patch(first.get_base_model(), "random", keep=4)
    with pytest.raises(RuntimeError, match="no longer on the model"):
        handle.unpatch()
    vlmprune.unpatch(first)
    assert_clean(model)
