"""`handle.disabled()`: the plain model, for an A/B."""

from __future__ import annotations

import copy
from threading import Barrier, Thread

import probes
import pytest
import reference
import tiny
import torch
from probes import far, same
from reference import Rule
from tiny import CACHE
from transformers import StaticCache

import vlmprune
import vlmprune.registry


def prompt_of(model):
    return tiny.prompt(model, [4, "image", 6], [(40, 24)])


def logits(model, inputs, **options):
    given = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return torch.stack(model.generate(**inputs, **given, **options).logits)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_disabled_is_the_plain_model(tiny_model, family):
    model = tiny_model(family=family)
    prompt, forced = prompt_of(model), probes.random_tokens(1, 3)
    plain = probes.forced_logits(model, prompt, forced)
    with vlmprune.patch(model, "vtc_cls", keep=0.3) as handle:
        pruned = probes.forced_logits(model, prompt, forced)
        trace = handle.trace
        with handle.disabled() as same_model:
            assert same_model is model
            assert torch.equal(probes.forced_logits(model, prompt, forced), plain)
            with pytest.raises(KeyError), handle.disabled():
                raise KeyError
            assert torch.equal(probes.forced_logits(model, prompt, forced), plain)
        assert handle.trace is trace
        assert torch.equal(probes.forced_logits(model, prompt, forced), pruned)
        with pytest.raises(KeyError), handle.disabled():
            raise KeyError
        assert torch.equal(probes.forced_logits(model, prompt, forced), pruned)
    far(pruned, plain)


def test_a_generation_under_way_stays_pruned_while_disabled(tiny_model):
    model, rules, forced = tiny_model(dtype=torch.float64), [Rule(0), Rule(2, 2)], probes.random_tokens(1, 3)
    prompt = prompt_of(model)
    length = prompt["input_ids"].shape[1]
    with torch.no_grad():
        want = reference.run(model, prompt, rules, forced[0].tolist()).logits
        with vlmprune.patch(model, probes.rules(*rules)) as handle:
            out = model(**prompt)
            with handle.disabled():
                got = model(input_ids=forced, **{CACHE: out[CACHE]},
                            attention_mask=torch.ones(1, length + 3)).logits[0]  # fmt: skip
    same(got, want[1:])


@pytest.mark.parametrize(
    ("method", "options"), [("fopru", {"keep": 4}), ("fastv", {"keep": 4, "positions": "contiguous"})]
)
def test_a_reused_static_cache_forgets_the_pruned_prompt(tiny_model, method, options):
    model = tiny_model(dtype=torch.float64)
    prompt = prompt_of(model)
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    with torch.no_grad():
        plain = logits(model, prompt, **{CACHE: cache})
        cache.reset()
        with vlmprune.patch(model, method, **options) as handle:
            pruned = logits(model, prompt, **{CACHE: cache})
            cache.reset()
            with handle.disabled():
                again = logits(model, prompt, **{CACHE: cache})
    assert (pruned - plain).abs().max() > 1e-3
    torch.testing.assert_close(again, plain, rtol=1e-9, atol=1e-9)


def test_it_holds_for_its_own_thread(tiny_model):
    """Blocks of two threads overlap; afterwards the model prunes as before."""
    model = tiny_model()
    prompt = prompt_of(model)
    first, second, seen = Barrier(2), Barrier(2), {}
    with torch.no_grad():
        plain = model(**prompt).logits
        with vlmprune.patch(model, "fopru", keep=4) as handle:
            pruned = model(**prompt).logits

            def early():
                with handle.disabled():
                    first.wait()
                    with torch.no_grad():
                        seen["early"] = model(**prompt).logits
                second.wait()

            def late():
                first.wait()
                with handle.disabled():
                    second.wait()
                    with torch.no_grad():
                        seen["late"] = model(**prompt).logits

            threads = [Thread(target=early), Thread(target=late)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert torch.equal(seen["early"], plain)
            assert torch.equal(seen["late"], plain)
            assert torch.equal(model(**prompt).logits, pruned)


def test_blocks_nest_and_copies_prune(tiny_model):
    model = tiny_model()
    prompt = prompt_of(model)
    with torch.no_grad(), vlmprune.patch(model, "fopru", keep=4) as handle:
        pruned = model(**prompt).logits
        with handle.disabled():
            twin = copy.deepcopy(model)
            with handle.disabled():
                plain = model(**prompt).logits
            assert torch.equal(model(**prompt).logits, plain)
            assert torch.equal(twin(**prompt).logits, pruned)
        assert torch.equal(model(**prompt).logits, pruned)
        assert not torch.equal(plain, pruned)


def test_a_handle_of_a_replaced_patch_says_so(tiny_model):
    model = tiny_model()
    old = vlmprune.patch(model, "random", keep=2)
    new = vlmprune.patch(model, "fopru", keep=4)
    with pytest.raises(RuntimeError, match="no longer on the model"), old.disabled():
        pass
    with new.disabled():
        pass
    new.unpatch()
    with pytest.raises(RuntimeError, match="no longer on the model"), new.disabled():
        pass


def test_other_mistakes():
    model = tiny.shared()
    with pytest.raises(TypeError, match="is a class"):
        vlmprune.patch(model, vlmprune.registry.find("fopru"), keep=3)
    with pytest.raises(TypeError, match="unpatch needs a model"):
        vlmprune.unpatch(None)
    prompt = prompt_of(model)
    with vlmprune.patch(model, "fopru", keep=3), pytest.raises(vlmprune.UnsupportedError, match="vision_feature_layer"):
        model(**prompt, vision_feature_layer=-1)
