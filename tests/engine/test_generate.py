"""`generate` and its caches, threads and streams."""

from __future__ import annotations

import threading

import probes
import pytest
import reference
import tiny
import torch
from clocks import PATIENCE
from probes import far, same
from reference import Rule
from scenes import FAMILIES, Scene, start
from tiny import CACHE
from transformers import DynamicCache, StaticCache, TextIteratorStreamer

import vlmprune
from vlmprune import registry

F64 = torch.float64
RULES = {
    "0": [Rule(0)],
    "2": [Rule(2)],
    "several": [Rule(0, 2), Rule(2, 5, 3, positions="original"), Rule(3, 4, 3)],
}
MODELS = {
    "llama": {},
    "next": {"family": "llava_next"},
    "mistral-window": {"text": "mistral", "sliding_window": 9},
    "qwen2-mixed": {"text": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
}
PROMPTS = [([3, "image", 6], [(24, 24)]), (["image", 2, "image", 4], [(40, 24), (24, 60)]), ([9], [])]


def three(model):
    return [tiny.prompt(model, parts, sizes, seed) for seed, (parts, sizes) in enumerate(PROMPTS)]


def expect(model, prompts, rules, forced):
    with torch.no_grad():
        return torch.stack([reference.run(model, p, rules, forced[i].tolist()).logits for i, p in enumerate(prompts)])


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_static_cache_equals_dynamic_cache(tiny_model, options, rules, attn):
    # eager attention of transformers gives NaN in float64 where a row sees nothing
    dtype = F64 if attn == "sdpa" else torch.float32
    model, forced, tolerance = (
        tiny_model(dtype=dtype, attn=attn, **options),
        probes.random_tokens(3, 5),
        probes.TOLERANCE[dtype],
    )
    prompts = three(model)
    batch, expected = tiny.batch(prompts), expect(model, prompts, rules, forced)
    with vlmprune.patch(model, probes.rules(*rules)):
        same(
            probes.generated_logits(model, batch, forced, cache_implementation="static", disable_compile=True),
            expected,
            tolerance,
        )
        for i, p in enumerate(prompts):
            got = probes.generated_logits(
                model, p, forced[i : i + 1], cache_implementation="static", disable_compile=True
            )
            same(got[0], expected[i], tolerance)


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_a_static_cache_can_be_reset_and_used_again(tiny_model, rules):
    model = tiny_model(dtype=F64)
    prompts = three(model)
    cache = StaticCache(config=model.config.text_config, max_cache_len=80)
    with vlmprune.patch(model, probes.rules(*rules)):
        for i in (0, 1, 2, 0, 2):
            forced = probes.random_tokens(1, 5, seed=i)
            same(probes.forced_logits(model, prompts[i], forced, cache)[0],
                 expect(model, prompts[i : i + 1], rules, forced)[0])  # fmt: skip
            cache.reset()
    # and by the plain model, which must not inherit anything
    forced = probes.random_tokens(1, 5)
    same(probes.forced_logits(model, prompts[0], forced, cache)[0], expect(model, prompts[:1], [], forced)[0])


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("batched", [False, True])
def test_generate_without_a_cache(tiny_model, layer, positions, batched):
    """Gappy position ids without mask and cache are read as packed sequences: nothing may be hidden by that."""
    model, rules = tiny_model(dtype=F64), [Rule(layer, positions=positions)]
    prompts = three(model) if batched else three(model)[:1]
    forced = probes.random_tokens(len(prompts), 5)
    with vlmprune.patch(model, probes.rules(*rules)):
        got = probes.generated_logits(model, tiny.batch(prompts), forced, use_cache=False)
    same(got, expect(model, prompts, rules, forced))
    far(got[:1], expect(model, prompts[:1], reference.other_positions(rules), forced[:1]))


def test_without_a_mask_or_a_cache(tiny_model):
    model, rules = tiny_model(dtype=F64), [Rule(0, positions="original"), Rule(2, 2, positions="original")]
    prompt = three(model)[0]
    with torch.no_grad(), vlmprune.patch(model, probes.rules(*rules)):
        out = model(input_ids=prompt["input_ids"], pixel_values=prompt["pixel_values"], use_cache=False)
        same(out.logits[0, -1], reference.run(model, prompt, rules).logits[0])


class Crops(DynamicCache):
    """Counts roll-backs."""

    cropped = 0

    def crop(self, *args):
        self.cropped += 1
        super().crop(*args)


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_prompt_lookup_decoding_rolls_a_pruned_cache_back(tiny_model, rules):
    """The prefill comes with guessed tokens behind the prompt, and those that were wrong leave the cache again."""
    model = tiny_model(dtype=F64)
    prompt = tiny.prompt(model, [3, "image", 12], [(24, 24)])
    prompt["input_ids"][0, 19:] = torch.tensor([7, 8, 9, 10] * 3)
    cache = Crops(config=model.config.text_config)
    with vlmprune.patch(model, probes.rules(*rules)):
        plain = model.generate(**prompt, max_new_tokens=12, do_sample=False)
        assisted = model.generate(
            **prompt, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3, **{CACHE: cache}
        )
    assert cache.cropped
    assert torch.equal(assisted, plain)


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("options", [MODELS["llama"], MODELS["mistral-window"]], ids=["llama", "window"])
def test_rolling_a_pruned_cache_back(tiny_model, rules, options):
    """Wrong guesses are cropped off a cache; the next steps must not notice that they were there."""
    model, forced = tiny_model(dtype=F64, **options), probes.random_tokens(1, 8)
    prompt = three(model)[0]
    length = prompt["input_ids"].shape[1]
    expected = expect(model, [prompt], rules, forced)[0]
    for with_mask in (True, False):
        cache = DynamicCache(config=model.config.text_config)
        if "sliding_window" in options:
            for layer in cache.layers:
                layer.activate_past_recording() if hasattr(layer, "activate_past_recording") else None
        with torch.no_grad(), vlmprune.patch(model, probes.rules(*rules)):
            # the prompt with two guesses behind it, of which the second is wrong
            ids = torch.cat((prompt["input_ids"], forced[:, :1], forced[:, :1] * 0 + 9), 1)
            out = model(**(prompt | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}), **{CACHE: cache})
            got = [out.logits[0, length - 1], out.logits[0, length]]
            cache.crop(-1)
            for step in (1, 2, 3):
                # a right token and a wrong one
                tokens = torch.cat((forced[:, step : step + 1], forced[:, :1] * 0 + 9), 1)
                extra = {"attention_mask": torch.ones(1, length + step + 2)} if with_mask else {}
                positions = torch.tensor([[length + step, length + step + 1]])
                out = model(input_ids=tokens, **{CACHE: cache}, position_ids=positions, **extra)
                got.append(out.logits[0, 0])
                cache.crop(-1)
        same(torch.stack(got), expected[:5])


@pytest.mark.parametrize("name", registry.names())
@torch.no_grad()
def test_no_method_looks_at_guesses(name):
    """What is kept is decided by the prompt, and not by what may come after it."""
    scene = Scene(*FAMILIES["next"])
    prompt = scene.prompt()
    prompt["input_ids"][0, -5:] = torch.tensor([7, 8, 9, 7, 8])
    with start(scene, name) as handle:
        scene.model.generate(**prompt, max_new_tokens=5, do_sample=False)
        alone = handle.trace
        scene.model.generate(**prompt, max_new_tokens=5, do_sample=False, prompt_lookup_num_tokens=4)
        assert handle.trace.prompt_length > alone.prompt_length
        for with_guesses, cut in zip(handle.trace.cuts, alone.cuts, strict=True):
            assert torch.equal(with_guesses.keep, cut.keep)
            if cut.scores is not None:
                same(with_guesses.scores.double(), cut.scores.double(), 1e-9)
        # only there they are guesses: of a call without a cache, and of one with pixels, all is prompt
        scene.model(**prompt, logits_to_keep=3)
        for mine, cut in zip(handle.trace.cuts, alone.cuts, strict=True):
            assert torch.equal(mine.keep, cut.keep)


# Continuing a conversation


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_continuing_on_a_pruned_cache(tiny_model, rules):
    """`generate` slices the prompt by the cache's physical length, which is short: nothing may be fed twice."""
    model = tiny_model(dtype=F64)
    prompt = three(model)[0]
    more, forced = probes.random_tokens(1, 4, seed=5), probes.random_tokens(1, 4, seed=6)
    with vlmprune.patch(model, probes.rules(*rules)):
        first = model.generate(**prompt, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        said = first.sequences[:, prompt["input_ids"].shape[1] :]
        ids = torch.cat((first.sequences, more), 1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        got = probes.generated_logits(model, turn, forced, **{CACHE: first[CACHE]})[0]
    tail = [*said[0].tolist(), *more[0].tolist(), *forced[0].tolist()]
    same(got, expect(model, [prompt], rules, torch.tensor([tail]))[0][-5:])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_continuing_in_a_padded_batch(tiny_model, rules, kind):
    model = tiny_model(dtype=F64)
    prompts = three(model)
    batch = tiny.batch(prompts)
    said, forced = probes.random_tokens(3, 4, seed=5), probes.random_tokens(3, 3, seed=6)
    text = model.config.text_config
    cache = DynamicCache(config=text) if kind == "dynamic" else StaticCache(config=text, max_cache_len=120)
    with vlmprune.patch(model, probes.rules(*rules)):
        model.generate(**batch, max_new_tokens=1, do_sample=False, **{CACHE: cache}, disable_compile=True)
        ids, mask = torch.cat((batch["input_ids"], said), 1), batch["attention_mask"]
        turn = {"input_ids": ids, "attention_mask": torch.cat((mask, torch.ones_like(said)), 1)}
        got = probes.generated_logits(model, turn, forced, **{CACHE: cache}, disable_compile=True)
    same(got, expect(model, prompts, rules, torch.cat((said, forced), 1))[:, 4:])


# Nothing mixes


def test_one_model_in_two_threads(tiny_model):
    model, rules = tiny_model(dtype=F64), RULES["several"]
    prompts, forced = three(model)[:2], probes.random_tokens(2, 16)
    expected, got, tokens, start = expect(model, prompts, rules, forced), [[], []], [[], []], threading.Barrier(2)

    def work(i):
        start.wait()
        for _ in range(4):
            got[i].append(probes.forced_logits(model, prompts[i], forced[i : i + 1])[0])
            tokens[i].append(model.generate(**prompts[i], max_new_tokens=8, do_sample=False)[0])

    with vlmprune.patch(model, probes.rules(*rules)):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        alone = [model.generate(**p, max_new_tokens=8, do_sample=False)[0] for p in prompts]
    for i in range(2):
        assert len(got[i]) == len(tokens[i]) == 4
        for logits in got[i]:
            same(logits, expected[i])
        assert all(torch.equal(t, alone[i]) for t in tokens[i])
    far(expected[0], expected[1])


def test_tower_taps_in_two_threads(tiny_model):
    model = tiny_model(family="llava_next", dtype=F64)
    prompts, got, start = three(model)[:2], [[], []], threading.Barrier(2)
    with vlmprune.patch(model, "vtc_cls", keep=0.3), torch.no_grad():
        want = [model(**p).logits for p in prompts]

        def work(i):
            start.wait()
            with torch.no_grad():  # the mode is a thread's own
                got[i] = [model(**prompts[i]).logits for _ in range(8)]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i in range(2):
        assert len(got[i]) == 8
        assert all(torch.equal(logits, want[i]) for logits in got[i])


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(tiny.VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def test_streaming_from_a_thread(tiny_model):
    model, rules, words = tiny_model(dtype=F64), RULES["several"], tokenizer()
    prompts = three(model)[:2]
    with vlmprune.patch(model, probes.rules(*rules)):
        plain = [model.generate(**p, max_new_tokens=12, do_sample=False)[0, p["input_ids"].shape[1] :] for p in prompts]
        streamers = [TextIteratorStreamer(words, skip_prompt=True, timeout=PATIENCE) for _ in prompts]
        threads = [
            threading.Thread(
                target=model.generate, kwargs=p | {"max_new_tokens": 12, "do_sample": False, "streamer": s}
            )
            for p, s in zip(prompts, streamers, strict=True)
        ]
        for thread in threads:
            thread.start()
        texts = ["".join(s) for s in streamers]
        for thread in threads:
            thread.join()
    assert texts == [words.decode(p) for p in plain]
    assert texts[0] != texts[1]


def test_two_models_patched_differently(tiny_model):
    models = [tiny_model(dtype=F64), tiny_model(dtype=F64, seed=1), tiny_model(dtype=F64, family="llava_next")]
    rules = [RULES["0"], RULES["several"], RULES["2"]]
    prompts = [three(m)[0] for m in models]
    forced = probes.random_tokens(1, 4)
    expected = [expect(m, [p], r, forced)[0] for m, p, r in zip(models, prompts, rules, strict=True)]
    plain = expect(models[0], prompts[:1], [], forced)[0]
    handles = [vlmprune.patch(m, probes.rules(*r)) for m, r in zip(models, rules, strict=True)]
    for _ in range(2):
        for model, prompt, want in zip(models, prompts, expected, strict=True):
            same(probes.forced_logits(model, prompt, forced)[0], want)
    handles[0].unpatch()
    same(probes.forced_logits(models[0], prompts[0], forced)[0], plain)
    same(probes.forced_logits(models[1], prompts[1], forced)[0], expected[1])
