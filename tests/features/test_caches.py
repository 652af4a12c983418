"""Kinds of caches, with real methods on every family."""

from __future__ import annotations

import probes
import pytest
import tiny
import torch
import transformers.generation.utils
from probes import far, same
from scenes import FAMILIES, FORCED, Scene, start
from tiny import CACHE
from transformers import DynamicCache, QuantizedCache, StaticCache, cache_utils
from transformers.cache_utils import DynamicLayer

import vlmprune
from vlmprune import UnsupportedError

METHODS = ["fopru", "fastv", "todre", "tome"]  # cut before the language model, inside it, both, in the tower
STEPS = torch.tensor([FORCED])
Fp8 = getattr(cache_utils, "Fp8QuantizedLayer", None)
needs_fp8 = pytest.mark.skipif(Fp8 is None, reason="this transformers has no cache in 8-bit floating point")


def answer(model, prompt, cache, **options):
    return probes.generated_logits(model, prompt, STEPS, **{CACHE: cache}, disable_compile=True, **options)


def later(prompt, question):
    """A question behind a prompt and the first words of its answer."""
    ids = torch.cat((prompt["input_ids"], STEPS, question["input_ids"]), 1)
    return question | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def held(cache):
    return [int(cache.get_seq_length(layer)) for layer in range(tiny.LAYERS)]


@pytest.mark.parametrize("name", METHODS)
def test_a_static_cache(scene, name, support):
    support("static cache", scene, name)
    model, prompt, text = scene.model, scene.prompt(), scene.model.config.text_config
    static, dynamic = StaticCache(config=text, max_cache_len=600), DynamicCache(config=text)
    plain = answer(model, prompt, DynamicCache(config=text))
    with torch.no_grad(), start(scene, name) as handle:
        for asked in (prompt, later(prompt, scene.questions()[1])):
            got = answer(model, asked, static)
            same(got, answer(model, asked, dynamic))
            far(got, plain)
        assert held(static) == held(dynamic)
        static.reset()
        same(answer(model, prompt, static), answer(model, prompt, None))
        assert held(static) == [n + len(FORCED) for n in handle.trace.kv_lengths]


class Rounding(DynamicLayer):
    """Rounds what it holds to 8 bits by the scale of what came first, which is read as it came."""

    def update(self, keys, values, *args, **kwargs):
        first = not self.is_initialized
        self.scales = [Fp8._quantize(Fp8, x)[1] for x in (keys, values)] if first else self.scales
        rounded = [
            (Fp8._quantize(Fp8, x, scale)[0].float() * scale).to(x.dtype)
            for x, scale in zip((keys, values), self.scales, strict=True)
        ]
        everything = super().update(*rounded)
        return (keys, values) if first else everything


def rounding():
    cache = DynamicCache()
    cache.layers = [Rounding() for _ in range(tiny.LAYERS)]
    return cache


@needs_fp8
@pytest.mark.parametrize("name", METHODS)
def test_a_quantized_cache(family_scene, name, support):
    """The same numbers as in a cache that rounds what it holds."""
    scene = family_scene
    support("quantized cache", scene, name)
    model, prompt, text = scene.model, scene.prompt(), scene.model.config.text_config
    if "sliding_window" in scene.options:
        with pytest.raises(ValueError, match="only full attention"):
            QuantizedCache("fp8", config=text)
        pytest.skip("the host has no quantized cache for sliding windows")
    quantized, rounded = QuantizedCache("fp8", config=text), rounding()
    with torch.no_grad(), start(scene, name) as handle:
        got = answer(model, prompt, quantized)
        same(got, answer(model, prompt, rounded))
        far(got, answer(model, prompt, None))
        assert held(quantized) == [n + len(FORCED) for n in handle.trace.kv_lengths]
        asked = later(prompt, scene.questions()[1])
        if name in ("fastv", "todre"):  # these look at attention, and so at the keys
            with pytest.raises(UnsupportedError, match=r"QuantizedCache does not hold .* keys as they are"):
                answer(model, asked, quantized)
        else:
            same(answer(model, asked, quantized), answer(model, asked, rounded))


def test_a_cache_quantized_by_quanto():
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    model = tiny.shared()
    prompt, text = tiny.prompt(model, [3, "image", 6], [(24, 24)]), model.config.text_config
    with torch.no_grad(), vlmprune.patch(model, "fopru", keep=8) as handle:
        cache = QuantizedCache("quanto", config=text, nbits=4, q_group_size=16)
        got, exact = answer(model, prompt, cache), answer(model, prompt, None)
        same(got[:, 0], exact[:, 0], 1e-6)  # the prompt is read as it is
        far(got[:, 1], exact[:, 1], 1e-6)
        assert held(cache) == [n + len(FORCED) for n in handle.trace.kv_lengths]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads caches from CUDA devices alone")
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("name", METHODS)
def test_an_offloaded_cache(name, kind, support):
    model = tiny.model(dtype=torch.float64).cuda()
    support("offloaded cache", model, name)
    prompt = {key: value.cuda() for key, value in Scene(*FAMILIES["llava"]).prompt().items()}
    options = {"todre": {"keep": 0.4, "tau": 0.35}}.get(name, {"keep": 0.4})
    asked = {"max_new_tokens": 5, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    with torch.no_grad(), vlmprune.patch(model, name, **options):
        want = model.generate(**prompt, **asked)
        got = model.generate(**prompt, **asked, cache_implementation=kind, disable_compile=True)
    assert torch.equal(got.sequences, want.sequences)
    same(torch.stack(got.scores), torch.stack(want.scores), 1e-5)


@pytest.mark.skipif(
    not hasattr(transformers.generation.utils, "_slice_mm_encoder_output"),
    reason="this transformers drops the images of a prompt that is read in pieces",
)
@pytest.mark.parametrize("name", METHODS)
def test_a_prompt_read_in_pieces(scene, name, support):
    support("chunked prefill", scene, name, refused="the host cuts the features of images into pieces")
    with torch.no_grad(), start(scene, name):
        for size in (9, 600):
            with pytest.raises(UnsupportedError, match="`prefill_chunk_size` is not supported"):
                probes.generated_logits(scene.model, scene.prompt(), STEPS, prefill_chunk_size=size)
