"""`handle.disabled()`: the plain model, for an A/B."""

from __future__ import annotations

import copy
from threading import Barrier, Thread

import pytest
import tiny
import torch
from transformers import StaticCache

import vlmprune
import vlmprune.registry


def logits(model, inputs, **options):
    given = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return torch.stack(model.generate(**inputs, **given, **options).logits)


@pytest.mark.parametrize(
    ("method", "options"), [("fopru", {"keep": 4}), ("fastv", {"keep": 4, "positions": "contiguous"})]
)
def test_a_reused_static_cache_forgets_the_pruned_prompt(tiny_model, method, options):
    model = tiny_model(dtype=torch.float64)
    prompt = tiny.prompt(model, [4, "image", 5], [(24, 24)])
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    with torch.no_grad():
        plain = logits(model, prompt, past_key_values=cache)
        cache.reset()
        with vlmprune.patch(model, method, **options) as handle:
            pruned = logits(model, prompt, past_key_values=cache)
            cache.reset()
            with handle.disabled():
                again = logits(model, prompt, past_key_values=cache)
    assert (pruned - plain).abs().max() > 1e-3
    torch.testing.assert_close(again, plain, rtol=1e-9, atol=1e-9)


def test_it_holds_for_its_own_thread(tiny_model):
    """Blocks of two threads overlap; afterwards the model prunes as before."""
    model = tiny_model()
    prompt = tiny.prompt(model, [4, "image", 5], [(24, 24)])
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
    prompt = tiny.prompt(model, [4, "image", 5], [(24, 24)])
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
    prompt = tiny.prompt(model, [4, "image", 5], [(24, 24)])
    with vlmprune.patch(model, "fopru", keep=3), pytest.raises(vlmprune.UnsupportedError, match="vision_feature_layer"):
        model(**prompt, vision_feature_layer=-1)
