"""Row i of a batch equals the same prompt run alone; and images map to rows, beams included."""

from __future__ import annotations

import probes
import pytest
import reference
import tiny
import torch
from probes import far, same
from reference import Rule

import vlmprune

F64 = torch.float64
STEPS = 5
RULES = {
    "select-0": [Rule(0)],
    "select-2-original": [Rule(2, positions="original")],
    "several": [Rule(0, 2), Rule(2, 5, 3, positions="original"), Rule(3, 4, 3)],
    "merge": [Rule(1, merge=True)],
}
MODELS = {
    "llava-llama-clip": {},
    "llava-mistral-clip": {"text": "mistral", "sliding_window": 9},
    "llava-qwen2-siglip": {"text": "qwen2", "tower": "siglip"},
    "llava-qwen2-mixed": {"text": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    "next-mistral-clip": {"family": "llava_next", "text": "mistral", "sliding_window": 9},
    "next-llama-siglip": {"family": "llava_next", "tower": "siglip"},
}
PROMPTS = [
    ([3, "image", 6], [(24, 24)]),
    ([11], []),
    (["image", "image", 2, "image", 4], [(40, 24), (24, 60), (33, 20)]),
    ([7, "image", 1, "image", 1], [(70, 20), (24, 24)]),
]


def four(model):
    return [tiny.prompt(model, parts, sizes, seed) for seed, (parts, sizes) in enumerate(PROMPTS)]


def with_images(prompts):
    """`generate` takes padded tiles of text-only rows; a batch row without images is only a row."""
    return [p for p in prompts if "pixel_values" in p]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_rows_equal_prompts_alone(tiny_model, options, rules, side):
    model = tiny_model(dtype=F64, **options)
    prompts, forced = four(model), probes.random_tokens(4, STEPS)
    with torch.no_grad():
        expected, twins = (
            torch.stack([reference.run(model, p, r, forced[i].tolist()).logits for i, p in enumerate(prompts)])
            for r in (rules, reference.wrong(rules))
        )
    with vlmprune.patch(model, probes.rules(*rules)) as handle:
        together = probes.forced_logits(model, tiny.batch(prompts, side), forced)
        trace = handle.trace
        alone = torch.cat([probes.forced_logits(model, p, forced[i : i + 1]) for i, p in enumerate(prompts)])
    if side == "right" and "sliding_window" in options and rules[0].layer > 0:
        # below the first cut the host's own cache lets padding fill the window: no decode step of it is right
        together, alone, expected, twins = (x[:, :1] for x in (together, alone, expected, twins))
    same(together, alone)
    same(together, expected)
    far(together[[0, 2, 3]], twins[[0, 2, 3]])
    assert trace.sample == [0, 2, 2, 2, 3, 3]
    with torch.no_grad():
        results = [reference.run(model, p, rules) for p in prompts]
    assert [list(row) for row in trace.row_lengths] == [
        list(t) for t in zip(*(r.kv_lengths for r in results), strict=True)
    ]
    assert trace.kv_lengths == [max(row) for row in trace.row_lengths]


@pytest.mark.parametrize("options", [{}, {"family": "llava_next"}, MODELS["llava-mistral-clip"]], ids=str)
def test_every_real_column_of_a_batch_equals_the_prompt_alone(tiny_model, options):
    model, rules = tiny_model(dtype=F64, **options), RULES["several"]
    prompts = four(model)
    with torch.no_grad(), vlmprune.patch(model, probes.rules(*rules)):
        alone = [model(**p).logits[0] for p in prompts]
        for side in ("left", "right"):
            batch = tiny.batch(prompts, side)
            logits = model(**probes.step_inputs(batch)).logits
            for i, want in enumerate(alone):
                same(logits[i][batch["attention_mask"][i].bool()], want)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_padded_batch_under_both_attentions(tiny_model, attn):
    """In float32: eager attention of transformers gives NaN in float64 where a row sees nothing."""
    model, rules, forced = tiny_model(attn=attn), RULES["several"], probes.random_tokens(4, STEPS)
    prompts = four(model)
    with torch.no_grad():
        expected = torch.stack(
            [reference.run(model, p, rules, forced[i].tolist()).logits for i, p in enumerate(prompts)]
        )
    with vlmprune.patch(model, probes.rules(*rules)):
        for side in ("left", "right"):
            same(probes.forced_logits(model, tiny.batch(prompts, side), forced), expected, 1e-5)


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_generate_greedy_and_beams(tiny_model, options, rules):
    """Forced logits first: greedy tokens alone may hide a wrong choice."""
    model = tiny_model(dtype=F64, **options)
    prompts, forced = four(model), probes.random_tokens(4, STEPS)
    batch = tiny.batch(prompts)
    length = batch["input_ids"].shape[1]
    with torch.no_grad():
        expected = torch.stack(
            [reference.run(model, p, rules, forced[i].tolist()).logits for i, p in enumerate(prompts)]
        )
    with vlmprune.patch(model, probes.rules(*rules)):
        same(probes.generated_logits(model, batch, forced), expected)
        for search in ({}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}):
            each = search.get("num_return_sequences", 1)
            got = model.generate(**batch, max_new_tokens=6, do_sample=False, **search)[:, length:]
            for i, p in enumerate(prompts):
                want = model.generate(**p, max_new_tokens=6, do_sample=False, **search)[:, p["input_ids"].shape[1] :]
                assert torch.equal(got[i * each : (i + 1) * each], want), (i, search)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_beam_scores_are_those_of_the_reference(tiny_model, family):
    """Sequence scores see every kept index of every beam, which tokens do not."""
    model, rules = tiny_model(family=family, dtype=F64), RULES["several"]
    prompts = four(model)
    batch = tiny.batch(prompts)
    length = batch["input_ids"].shape[1]
    with vlmprune.patch(model, probes.rules(*rules)):
        out = model.generate(
            **batch, max_new_tokens=5, num_beams=3, num_return_sequences=3, do_sample=False, length_penalty=0.0,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
    for i, prompt in enumerate(prompts):
        for beam in range(3):
            tokens = out.sequences[3 * i + beam, length:].tolist()
            scores = []
            for r in (rules, reference.wrong(rules)):
                with torch.no_grad():
                    logits = reference.run(model, prompt, r, tokens[:-1]).logits
                scores.append(logits.log_softmax(-1)[range(5), tokens].sum())
            same(out.sequences_scores[3 * i + beam].double(), scores[0], 1e-5)
            if "pixel_values" in prompt:
                far(out.sequences_scores[3 * i + beam].double(), scores[1], 1e-6)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("method", ["fopru", "vtc_cls", "fastv", "random", "grid", "pool"])
def test_methods_choose_in_a_batch_and_in_beams_what_they_choose_alone(tiny_model, family, method):
    model = tiny_model(family=family, dtype=F64)
    prompts = four(model)
    with vlmprune.patch(model, method, keep=0.4) as handle, torch.no_grad():
        alone, scores = [], []
        for p in with_images(prompts):
            model(**p)
            alone += [handle.trace.kept(i) for i in range(len(handle.trace.grids))]
            scores += [handle.trace.cuts[0].scores] if handle.trace.cuts[0].scores is not None else []
        batch = tiny.batch(prompts)
        model(**probes.step_inputs(batch))
        assert [handle.trace.kept(i) for i in range(6)] == alone
        beams = model.generate(**batch, max_new_tokens=3, num_beams=2, do_sample=False)
        # every prompt stands twice in a row with all its images
        per_row = [1, 0, 3, 2]
        starts = [sum(per_row[:i]) for i in range(4)]
        twice = [alone[s + j] for s, n in zip(starts, per_row, strict=True) for _ in range(2) for j in range(n)]
        assert [handle.trace.kept(i) for i in range(12)] == twice
        for i, p in enumerate(prompts):
            want = model.generate(**p, max_new_tokens=3, num_beams=2, do_sample=False)
            assert torch.equal(beams[i, -3:], want[0, -3:])
    assert len(set(map(tuple, alone))) > 1 or family == "llava"


def test_sampling_several_sequences(tiny_model):
    model, rules = tiny_model(dtype=F64), RULES["several"]
    prompts = four(model)
    batch = tiny.batch(prompts)
    length = batch["input_ids"].shape[1]
    with vlmprune.patch(model, probes.rules(*rules)):
        logits = []
        hook = model.lm_head.register_forward_hook(lambda module, args, output: logits.append(output[:, -1]))
        torch.manual_seed(0)
        out = model.generate(**batch, max_new_tokens=4, do_sample=True, num_return_sequences=2)
        hook.remove()
    got = torch.stack(logits, 1)
    for row in range(8):
        with torch.no_grad():
            want = reference.run(model, prompts[row // 2], rules, out[row, length : length + 3].tolist()).logits
        same(got[row], want)


def test_batches_that_do_not_fit_their_images_are_refused(tiny_model):
    model = tiny_model()
    prompt = tiny.prompt(model, [3, "image", 2], [(24, 24)])
    with vlmprune.patch(model, probes.rules(Rule(0))):
        with pytest.raises(ValueError, match="placeholders"):
            model(**(prompt | {"input_ids": prompt["input_ids"][:, :-4], "attention_mask": None}))
        with pytest.raises(ValueError, match="placeholders"):
            model(**(prompt | {"pixel_values": prompt["pixel_values"].repeat(2, 1, 1, 1)}))
