"""Cuts against by-hand references: one prompt, prefill and forced decode steps."""

from __future__ import annotations

import probes
import pytest
import reference
import tiny
import torch
from probes import TOLERANCE, far, same
from reference import Rule
from tiny import CACHE
from transformers import DynamicCache

import vlmprune

F64 = torch.float64
SIZES = {"llava": [(24, 24)], "llava_next": [(40, 24)]}
MODELS = {
    "llama": {"text": "llama"},
    "mistral-window": {"text": "mistral", "sliding_window": 7},
    "qwen2": {"text": "qwen2"},
    "qwen2-mixed": {"text": "qwen2", "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    "siglip": {"tower": "siglip"},
}


def check(model, prompt, rules, steps=6, tolerance=1e-9, forced=None):
    """Prefill and decode equal the reference; one wrong index and the other positions do not."""
    forced = probes.random_tokens(1, steps) if forced is None else forced
    with torch.no_grad():
        expected = reference.run(model, prompt, rules, forced[0].tolist())
        twins = [reference.run(model, prompt, twin(rules), forced[0].tolist()).logits
                 for twin in (reference.wrong, reference.other_positions)]  # fmt: skip
    with vlmprune.patch(model, probes.rules(*rules)) as handle:
        got = probes.forced_logits(model, prompt, forced)[0]
        trace = handle.trace
    same(got, expected.logits, tolerance)
    for twin in twins:
        far(got, twin, tolerance)
    assert trace.kv_lengths == expected.kv_lengths
    for cut, kept in enumerate(expected.kept):
        assert [trace.kept(i, cut) for i in range(len(kept))] == kept
    return expected


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("positions", ["contiguous", "original"])
@pytest.mark.parametrize("family", SIZES)
def test_decoder_0_is_the_language_model_on_selected_rows(tiny_model, family, positions, dtype):
    model = tiny_model(family=family, dtype=dtype)
    prompt, forced = tiny.prompt(model, [4, "image", 6], SIZES[family]), probes.random_tokens(1, 32)
    rule = Rule(0, positions=positions)
    with torch.no_grad():
        expected = reference.short_sequence(model, prompt, rule, forced[0].tolist())
        twins = [reference.short_sequence(model, prompt, twin([rule])[0], forced[0].tolist())
                 for twin in (reference.wrong, reference.other_positions)]  # fmt: skip
    with vlmprune.patch(model, probes.rules(rule)):
        for got in (probes.forced_logits, probes.generated_logits):
            logits = got(model, prompt, forced)[0]
            same(logits, expected, TOLERANCE[dtype])
            for twin in twins:
                far(logits, twin, TOLERANCE[dtype])


@pytest.mark.parametrize("positions", ["contiguous", "original"])
@pytest.mark.parametrize("layer", range(tiny.LAYERS))
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_one_cut_at_every_layer(tiny_model, options, layer, positions):
    model = tiny_model(dtype=F64, **options)
    check(model, tiny.prompt(model, [4, "image", 6], [(24, 24)]), [Rule(layer, positions=positions)])


CUTS = {
    "two": [Rule(0, 2), Rule(2, 5, 2)],
    "two-original-first": [Rule(0, 2, positions="original"), Rule(3, 5, 2)],
    "two-contiguous-first": [Rule(1, 2), Rule(2, 5, 2, positions="original")],
    "three": [Rule(1, 3, 2, positions="original"), Rule(2, 4, 3), Rule(3, 5, 2, positions="original")],
    "same-layer": [Rule(1, 2), Rule(1, 5, 3, positions="original"), Rule(2, 3, 2)],
    "known-counts": [Rule(0, 2, emergent=False), Rule(2, 5, 3, emergent=False)],
    "merge-0": [Rule(0, merge=True)],
    "merge-2": [Rule(2, merge=True, positions="original")],
    "merge-twice": [Rule(0, 2, merge=True), Rule(2, 3, 2, merge=True)],
    "merge-after-select": [Rule(0, 3, 2), Rule(2, 2, merge=True)],
    "select-after-merge": [Rule(1, 2, merge=True), Rule(3, 5, 3)],
}


@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("rules", CUTS.values(), ids=CUTS)
def test_several_cuts(tiny_model, rules, family):
    model = tiny_model(family=family, dtype=F64)
    check(model, tiny.prompt(model, [4, "image", 6], SIZES[family]), rules)


@pytest.mark.parametrize("rules", [CUTS["three"], CUTS["merge-2"]], ids=["three", "merge-2"])
@pytest.mark.parametrize("name", ["mistral-window", "qwen2-mixed"])
def test_several_cuts_under_a_sliding_window(tiny_model, rules, name):
    model = tiny_model(dtype=F64, **MODELS[name])
    check(model, tiny.prompt(model, [9, "image", 3], [(24, 24)]), rules, steps=12)


def test_several_cuts_in_float32(tiny_model):
    model = tiny_model()
    check(model, tiny.prompt(model, [4, "image", 6], [(24, 24)]), CUTS["three"], steps=32, tolerance=1e-5)


def test_merging_is_not_selecting(tiny_model):
    """The twin that `check` lacks: the same anchors without what flows into them."""
    model = tiny_model(dtype=F64)
    prompt = tiny.prompt(model, [4, "image", 6], [(24, 24)])
    for layer in (0, 2):
        with torch.no_grad():
            far(reference.run(model, prompt, [Rule(layer, merge=True)]).logits,
                reference.run(model, prompt, [Rule(layer)]).logits)  # fmt: skip


PARTS = {
    "image-first": ["image", 5],
    "image-last": [5, "image"],
    "image-alone": ["image"],
    "two-apart": [3, "image", 4, "image", 2],
    "two-adjacent": [3, "image", "image", 2],
    "three-and-adjacent-ends": ["image", "image", 1, "image"],
}


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_where_images_stand(tiny_model, parts, family, layer):
    model = tiny_model(family=family, dtype=F64)
    sizes = [(24, 24), (40, 24), (20, 70)][: parts.count("image")]
    rules = [Rule(layer), Rule(3, 5, 3, positions="original")]
    prompt = tiny.prompt(model, parts, sizes)
    expected = check(model, prompt, rules, forced=probes.random_tokens(1, 4))
    text = (prompt["input_ids"][0] != tiny.IMAGE).nonzero().flatten().tolist()
    assert set(text) <= set(expected.columns)


@pytest.mark.parametrize("rule", [Rule(0, 1, 0), Rule(2, 1, 0), Rule(0, 1, 0, positions="original")])
def test_a_cut_may_keep_nothing(tiny_model, rule):
    model, forced = tiny_model(dtype=F64), probes.random_tokens(1, 4)
    prompt = tiny.prompt(model, [4, "image", 6], [(24, 24)])
    with torch.no_grad():
        expected = reference.run(model, prompt, [rule], forced[0].tolist())
    with vlmprune.patch(model, probes.rules(rule)) as handle:
        same(probes.forced_logits(model, prompt, forced)[0], expected.logits)
        assert handle.trace.kept() == []


@pytest.mark.parametrize("family", SIZES)
def test_a_cut_that_keeps_all_is_the_identity_bitwise(tiny_model, family):
    model, forced = tiny_model(family=family), probes.random_tokens(1, 4)
    prompt = tiny.prompt(model, [4, "image", 6], SIZES[family])
    plain = probes.forced_logits(model, prompt, forced)
    for rules in ([Rule(0, 0)], [Rule(2, 0, merge=True)], [Rule(0, 0), Rule(1, 0, positions="original")]):
        with vlmprune.patch(model, probes.rules(*rules)):
            assert torch.equal(probes.forced_logits(model, prompt, forced), plain)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_attention_implementations(tiny_model, attn, name):
    """Eager attention of transformers takes its softmax in float32."""
    model = tiny_model(dtype=F64, attn=attn, **MODELS[name])
    check(
        model,
        tiny.prompt(model, [4, "image", 2], [(24, 24)]),
        CUTS["three"],
        tolerance=1e-6 if attn == "eager" else 1e-9,
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention needs a GPU")
@pytest.mark.gpu
def test_flash_attention_2_equals_sdpa():
    pytest.importorskip("flash_attn")
    prompts, logits = [], []
    for attn in ("sdpa", "flash_attention_2"):
        model = tiny.model(attn=attn, dtype=torch.bfloat16).cuda()
        prompts.append({k: v.cuda() for k, v in tiny.prompt(model.cpu(), [4, "image", 6], [(24, 24)]).items()})
        model.cuda()
        with vlmprune.patch(model, probes.rules(*CUTS["three"])), torch.no_grad():
            logits.append(model(**prompts[-1]).logits)
    same(logits[0], logits[1], 0.05)


def test_attention_gets_no_position_ids_with_gaps(tiny_model):
    """Flash attention takes gaps in them for the seams of packed sequences; the rotary embedding carries the places."""
    model, seen = tiny_model(dtype=F64), []
    hooks = [
        layer.self_attn.register_forward_pre_hook(lambda m, a, k: seen.append(k["position_ids"]), with_kwargs=True)
        for layer in model.model.language_model.layers
    ]
    with torch.no_grad(), vlmprune.patch(model, probes.rules(Rule(1, positions="original"))):
        model(**tiny.prompt(model, [4, "image", 6], [(24, 24)]))
    for hook in hooks:
        hook.remove()
    assert [len(ids[0]) for ids in seen] == [26, 15, 15, 15]
    assert all(bool((ids.diff() == 1).all()) for ids in seen)


# Shapes and contents of what a caller gets back


@pytest.mark.parametrize("parts", [[4, "image", 6], ["image", 5], [5, "image"]], ids=str)
@pytest.mark.parametrize("rules", [[Rule(0)], [Rule(2)], [Rule(0, 2), Rule(2, 5, 3, positions="original")]], ids=len)
def test_outputs_have_the_prompts_length(tiny_model, rules, parts):
    model = tiny_model(dtype=F64)
    prompt = tiny.prompt(model, parts, [(24, 24)])
    length = prompt["input_ids"].shape[1]
    with torch.no_grad():
        expected = reference.run(model, prompt, rules)
        with vlmprune.patch(model, probes.rules(*rules)):
            out = model(**prompt, output_hidden_states=True)
            inner = model.model(**prompt)
            last = model(**prompt, logits_to_keep=1).logits
    spread = expected.at_prompt_length(expected.hidden, length)
    same(inner.last_hidden_state[0], spread)
    same(out.logits[0], model.lm_head(spread))
    same(last[0], out.logits[0, -1:])
    far(inner.last_hidden_state[0], spread.roll(1, 0))
    assert len(out.hidden_states) == tiny.LAYERS + 1
    for index, states in enumerate(out.hidden_states):
        assert states.shape == (1, length, 32)
        if index < tiny.LAYERS - 1:
            # entry i + 1 is the output of layer i, so the input of layer i + 1 before its cuts
            x, columns = expected.inputs[index + 1]
            got = out.hidden_states[index + 1][0, columns]
            if not any(r.merge for r in rules):
                same(got, x)
    same(out.hidden_states[-1][0], spread)


def test_hidden_states_repeat_the_last_kept_column_of_their_layer(tiny_model):
    model, rule = tiny_model(dtype=F64), Rule(2)
    prompt = tiny.prompt(model, [4, "image", 6], [(24, 24)])
    with torch.no_grad(), vlmprune.patch(model, probes.rules(rule)):
        plain_layers = model(**prompt, output_hidden_states=True).hidden_states
    keep = rule.keeps(0, 16)
    for index, states in enumerate(plain_layers):
        for t, kept in enumerate(keep):
            equal = torch.equal(states[0, 4 + t], states[0, 3 + t])
            assert equal == (not kept and index > 2), (index, t)


def test_the_cache_is_physically_short(tiny_model):
    model = tiny_model(dtype=F64)
    prompt = tiny.prompt(model, [4, "image", 6], [(24, 24)])
    with torch.no_grad(), vlmprune.patch(model, probes.rules(*CUTS["three"])) as handle:
        cache = model(**prompt, use_cache=True)[CACHE]
    assert [layer.keys.shape[2] for layer in cache.layers] == handle.trace.kv_lengths
    assert handle.trace.kv_lengths[0] == 26 > handle.trace.kv_lengths[-1]


def test_calls_without_images_run_as_before(tiny_model):
    model, forced = tiny_model(dtype=F64), probes.random_tokens(1, 3)
    text = tiny.prompt(model, [9], [])
    plain = probes.forced_logits(model, text, forced)
    with vlmprune.patch(model, probes.rules(Rule(0), Rule(2))) as handle:
        assert torch.equal(probes.forced_logits(model, text, forced), plain)
        embeds = model.get_input_embeddings()(text["input_ids"])
        assert torch.equal(model(inputs_embeds=embeds).logits, model(**text).logits)
        with pytest.raises(RuntimeError, match="nothing was pruned since"):
            handle.trace  # noqa: B018


def test_tuple_outputs(tiny_model):
    model = tiny_model(dtype=F64)
    prompt = tiny.prompt(model, [4, "image", 6], [(24, 24)])
    with torch.no_grad(), vlmprune.patch(model, probes.rules(Rule(0))):
        assert torch.equal(model(**prompt, return_dict=False)[0], model(**prompt).logits)


def test_the_inner_model_alone_can_be_patched(tiny_model):
    model = tiny_model(dtype=F64)
    prompt = tiny.prompt(model, [4, "image", 6], [(24, 24)])
    with torch.no_grad():
        expected = reference.run(model, prompt, [Rule(0), Rule(2, 2)])
        with vlmprune.patch(model.model, probes.rules(Rule(0), Rule(2, 2))):
            got = model.model(**prompt).last_hidden_state[0]
    same(got, expected.at_prompt_length(expected.hidden, len(got)))


# Labels


@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("parts", [[4, "image", 6], ["image", 5], [5, "image", "image", 3]], ids=str)
@pytest.mark.parametrize("rules", [[Rule(0)], [Rule(2)], CUTS["merge-2"]], ids=["0", "2", "merge"])
def test_loss_is_that_of_the_pruned_sequence(tiny_model, family, parts, rules):
    model = tiny_model(family=family, dtype=F64)
    prompt = tiny.prompt(model, parts, SIZES[family] * parts.count("image"))
    labels = prompt["input_ids"].masked_fill(prompt["input_ids"] == tiny.IMAGE, -100)
    with torch.no_grad():
        expected = [reference.loss(model, reference.run(model, prompt, r), labels[0].tolist())
                    for r in (rules, reference.wrong(rules), reference.other_positions(rules))]  # fmt: skip
        with vlmprune.patch(model, probes.rules(*rules)):
            got = model(**prompt, labels=labels).loss.double()
    same(got, expected[0], 1e-6)  # transformers takes the loss in float32
    far(got, expected[1], 1e-7)
    far(got, expected[2], 1e-7)


@pytest.mark.parametrize("rules", [[Rule(0)], CUTS["merge-2"]], ids=["select", "merge"])
def test_gradients_are_those_of_the_pruned_sequence(tiny_model, rules):
    model = tiny_model(dtype=F64)
    prompt = tiny.prompt(model, [4, "image", 6], [(24, 24)])
    labels = prompt["input_ids"].masked_fill(prompt["input_ids"] == tiny.IMAGE, -100)
    weight = model.model.multi_modal_projector.linear_1.weight
    (expected,) = torch.autograd.grad(
        reference.loss(model, reference.run(model, prompt, rules), labels[0].tolist()), weight
    )
    with vlmprune.patch(model, probes.rules(*rules)):
        (got,) = torch.autograd.grad(model(**prompt, labels=labels).loss, weight)
    assert expected.abs().max() > 1e-5
    same(got, expected, 1e-6 * expected.abs().max().item())


def test_labels_on_placeholders_are_refused(tiny_model):
    model = tiny_model()
    prompt = tiny.prompt(model, [4, "image", 6], [(24, 24)])
    with vlmprune.patch(model, probes.rules(Rule(0))) as handle:
        with pytest.raises(ValueError, match="-100"):
            model(**prompt, labels=prompt["input_ids"])
        with handle.disabled():
            model(**prompt, labels=prompt["input_ids"])


# One cache after the other


def test_interleaved_decoding_of_two_caches(tiny_model):
    model, rules = tiny_model(dtype=F64), CUTS["three"]
    prompts = [
        tiny.prompt(model, [4, "image", 6], [(24, 24)]),
        tiny.prompt(model, [2, "image", 1, "image", 3], [(24, 24)] * 2, 3),
    ]
    forced = probes.random_tokens(2, 5)
    with torch.no_grad():
        expected = [reference.run(model, p, rules, forced[i].tolist()).logits for i, p in enumerate(prompts)]
    with torch.no_grad(), vlmprune.patch(model, probes.rules(*rules)):
        caches = [DynamicCache(config=model.config.text_config) for _ in prompts]
        outs = [[model(**p, **{CACHE: c}).logits[0, -1]] for p, c in zip(prompts, caches, strict=True)]
        for step in range(5):
            for i, cache in enumerate(caches):
                length = prompts[i]["input_ids"].shape[1]
                out = model(
                    input_ids=forced[i : i + 1, step : step + 1], **{CACHE: cache},
                    attention_mask=torch.ones(1, length + step + 1), position_ids=torch.tensor([[length + step]]),
                )  # fmt: skip
                outs[i].append(out.logits[0, -1])
    for got, want in zip(outs, expected, strict=True):
        same(torch.stack(got), want)


@pytest.mark.parametrize("given", ["nothing", "mask", "positions"])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_decoding_with_fewer_arguments(tiny_model, given, layer, positions):
    """Callers need not pass masks or position ids."""
    model, rules, forced = tiny_model(dtype=F64), [Rule(layer, positions=positions)], probes.random_tokens(1, 4)
    prompt = tiny.prompt(model, [4, "image", 6], [(24, 24)])
    length = prompt["input_ids"].shape[1]
    with torch.no_grad():
        expected = reference.run(model, prompt, rules, forced[0].tolist()).logits
        with vlmprune.patch(model, probes.rules(*rules)):
            vision = {k: prompt[k] for k in ("input_ids", "pixel_values")}
            out = model(**vision, use_cache=True)
            got = [out.logits[0, -1]]
            for step in range(4):
                extra = {
                    "nothing": {},
                    "mask": {"attention_mask": torch.ones(1, length + step + 1)},
                    "positions": {"position_ids": torch.tensor([[length + step]])},
                }[given]
                out = model(input_ids=forced[:, step : step + 1], **{CACHE: out[CACHE]}, **extra)
                got.append(out.logits[0, -1])
    same(torch.stack(got), expected)


@pytest.mark.parametrize("rules", [[Rule(0)], CUTS["three"]], ids=["one", "three"])
def test_a_chunk_of_several_tokens_on_a_pruned_cache(tiny_model, rules):
    """The next turn of a conversation comes as several tokens at once."""
    for options in (MODELS["llama"], MODELS["mistral-window"]):
        model, forced = tiny_model(dtype=F64, **options), probes.random_tokens(1, 6)
        prompt = tiny.prompt(model, [4, "image", 6], [(24, 24)])
        with torch.no_grad():
            expected = reference.run(model, prompt, rules, forced[0].tolist()).logits
            with vlmprune.patch(model, probes.rules(*rules)):
                cache = DynamicCache(config=model.config.text_config)
                model(**prompt, **{CACHE: cache})
                mask = torch.ones(1, prompt["input_ids"].shape[1] + 6)
                got = model(input_ids=forced, attention_mask=mask, **{CACHE: cache}).logits[0]
        same(got, expected[1:])
