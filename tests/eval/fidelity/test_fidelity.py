"""Measuring a pruned model against the unpruned one: by hand, and what must be exact."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

import vlmprune
from vlmprune.eval.fidelity import measure as fidelity
from vlmprune.eval.fidelity.labels import Labels
from vlmprune.eval.fidelity.measure import Compared, StudyEntry, StudyRow
from vlmprune.eval.fidelity.tables import in_words
from vlmprune.eval.statistics import Estimate

LONG = 6
SIZES = {
    "llava": [(24, 24)] * 3,
    "llava_next": [(24, 48), (24, 24), (48, 48)],
    "qwen2_5_vl": [(24, 40), (48, 16), (32, 32)],
}
#: No tower layer of packed pictures has a [CLS] token, and none merges.
FITTING = [
    (family, method)
    for family in SIZES
    for method in ("fopru", "vtc_cls", "fastv", "random", "pool", "downsample")
    if family != "qwen2_5_vl" or method not in ("vtc_cls", "downsample")
]


def prompts_of(model, seeds=range(3)):
    """Prompts of different lengths about different pictures."""
    sizes = SIZES[model.config.model_type]
    return [tiny.prompt(model, [2 + s % 3, "image", 3 + s % 4], [sizes[s % 3]], s) for s in seeds]


def measured(model, prompts, method, longest=LONG, **options):
    """Reference and comparisons of one batch."""
    inputs = fidelity.collate(prompts, tiny.PAD)
    full = fidelity.reference(model, inputs, longest)
    with vlmprune.patch(model, method, **options) as handle:
        return full, fidelity.compare(handle, inputs, full, longest)


def said(model, prompt, longest=LONG):
    """One prompt's greedy answer by `generate`, to its end."""
    tokens = model.generate(**prompt, max_new_tokens=longest, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return tokens.tolist()


def forced_logits(model, prompt, answer):
    """(len(answer), vocabulary): `generate` is allowed nothing but the answer, one token at a time."""
    start = prompt["input_ids"].shape[1]
    out = model.generate(
        **prompt, max_new_tokens=len(answer), do_sample=False, output_logits=True, return_dict_in_generate=True,
        prefix_allowed_tokens_fn=lambda _, ids: [answer[len(ids) - start]],
    )  # fmt: skip
    assert out.sequences[0, start:].tolist() == answer
    return torch.cat(out.logits)


def kl_by_hand(full, pruned):
    """KL of two (steps, vocabulary) tensors of logits, step by step, with plain sums in float64."""
    found = []
    for a, b in zip(full.double().numpy(), pruned.double().numpy(), strict=True):
        p, q = np.exp(a - a.max()), np.exp(b - b.max())
        p, q = p / p.sum(), q / q.sum()
        found.append(float(sum(x * (np.log(x) - np.log(y)) for x, y in zip(p, q, strict=True))))
    return found


@pytest.mark.parametrize(("family", "method"), FITTING)
def test_all_tokens_kept_is_the_unpruned_model(tiny_model, family, method):
    model = tiny_model(family=family)
    _, rows = measured(model, prompts_of(model), method, keep=1.0)
    for row in rows:
        assert (row.first_agrees, row.answer_agrees, row.kl_first, row.kl_answer) == (True, True, 0.0, 0.0)
        assert row.tokens_before == row.tokens_after == row.layer_average


@pytest.mark.parametrize(("family", "method"), [pair for pair in FITTING if pair[1] != "vtc_cls"])
def test_measures_by_hand(tiny_model, family, method):
    """A batch with padding against single prompts, decoded step by step."""
    model = tiny_model(family=family)
    prompts, keep = prompts_of(model), {"keep": 0.3}
    full, rows = measured(model, prompts, method, **keep)
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        answer = said(model, prompt)
        assert full.answer(i) == answer
        plain = forced_logits(model, prompt, answer)
        with vlmprune.patch(model, method, **keep) as handle:
            pruned = forced_logits(model, prompt, answer)
            entering, average = handle.trace.entering(), handle.trace.layer_average()
            assert row.tokens == said(model, prompt)
        kl = kl_by_hand(plain, pruned)
        assert row.kl_first == pytest.approx(kl[0], rel=1e-3, abs=1e-5)
        assert row.kl_answer == pytest.approx(np.mean(kl), rel=1e-3, abs=1e-5)
        assert row.kl_first > 1e-3
        assert kl[0] != pytest.approx(np.mean(kl), rel=1e-2)  # or one could pass for the other
        assert row.first_agrees == (plain[0].argmax() == pruned[0].argmax())
        assert row.answer_agrees == (row.tokens == answer)
        differ = (i for i, pair in enumerate(zip(row.tokens, answer, strict=False)) if pair[0] != pair[1])
        assert row.same_for == next(differ, min(len(row.tokens), len(answer)))
        alike = [int(step.argmax()) == token for step, token in zip(pruned, answer, strict=True)]
        for (tokens, agreeing, total), part in zip(
            row.along, (slice(1), slice(1, 2), slice(2, 4), slice(4, 6)), strict=True
        ):
            assert (tokens, agreeing) == (len(alike[part]), sum(alike[part]))
            assert total == pytest.approx(sum(kl[part]), rel=1e-3, abs=1e-5)
        assert (row.tokens_after, row.layer_average) == (entering, average)


def test_direction_of_the_divergence():
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    assert fidelity.divergence(p.log(), q.log()).item() == pytest.approx(0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(5))
    assert fidelity.divergence(q.log(), p.log()).item() == pytest.approx(0.9 * np.log(1.8) + 0.1 * np.log(0.2))
    never = torch.tensor([[1.0, 0.0]]).log()
    assert fidelity.divergence(never, never).item() == 0  # a token that nobody may say


def test_what_generates_alike_is_not_generated_again(tiny_model, monkeypatch):
    """Agreement is that of `generate`, and only prompts that may disagree are generated."""
    model = tiny_model(family="llava_next")
    prompts = prompts_of(model, range(12))
    inputs = fidelity.collate(prompts, tiny.PAD)
    full = fidelity.reference(model, inputs, LONG)
    rows = []
    whole = fidelity.greedy
    monkeypatch.setattr(fidelity, "greedy", lambda m, x, n: (rows.append(len(x["input_ids"])), whole(m, x, n))[1])
    with vlmprune.patch(model, "fopru", keep=0.7) as handle:
        compared = fidelity.compare(handle, inputs, full, LONG)
        truth = [said(model, prompt) for prompt in prompts]
    assert [c.tokens for c in compared] == truth
    agreeing = [c.answer_agrees for c in compared]
    assert agreeing == [truth[i] == full.answer(i) for i in range(12)]
    assert 0 < sum(agreeing) < 12  # otherwise nothing was shown
    assert rows == [12 - sum(agreeing)]


def test_generation_that_is_no_bare_argmax(tiny_model):
    """With a repetition penalty the likeliest tokens do not tell what is generated."""
    model = tiny_model(family="llava_next")
    model.generation_config.repetition_penalty = 1.1
    try:
        prompts = prompts_of(model, range(12))
        inputs = fidelity.collate(prompts, tiny.PAD)
        full = fidelity.reference(model, inputs, LONG)
        assert not full.pure.any()
        with vlmprune.patch(model, "fopru", keep=0.7) as handle:
            compared = fidelity.compare(handle, inputs, full, LONG)
            alike = (fidelity.along(model, inputs, full.tokens).argmax(-1) == full.tokens).all(1).tolist()
            assert [row.tokens for row in compared] == [said(model, prompt) for prompt in prompts]
        assert any(a and not row.answer_agrees for a, row in zip(alike, compared, strict=True))  # the case in question
    finally:
        model.generation_config.repetition_penalty = None


def test_answers_end(tiny_model):
    """What stands behind an answer's end counts for nothing; the end itself does."""
    model = tiny_model(family="llava_next")
    prompts = prompts_of(model)
    whole = [said(model, prompt) for prompt in prompts]
    assert whole[0][1] not in whole[0][:1]
    model.generation_config.eos_token_id = [whole[0][1], 2]
    try:
        full, rows = measured(model, prompts, "fopru", keep=3)
        assert full.answer(0) == whole[0][:2]
        assert any(len(full.answer(i)) == LONG for i in (1, 2))  # a batch of unequal answers
        assert [tokens for tokens, *_ in rows[0].along] == [1, 1]
        assert max(sum(tokens for tokens, *_ in row.along) for row in rows) == LONG
        kl = []
        for patched in (False, True):
            with vlmprune.patch(model, "fopru", keep=3) if patched else torch.no_grad():
                kl.append(forced_logits(model, prompts[0], whole[0][:2]))
        assert rows[0].kl_answer == pytest.approx(np.mean(kl_by_hand(*kl)), rel=1e-3)
    finally:
        model.generation_config.eos_token_id = None


def test_outputs_that_are_no_numbers(tiny_model):
    model = tiny_model()
    prompts = prompts_of(model)
    inputs = fidelity.collate(prompts, tiny.PAD)
    full = fidelity.reference(model, inputs, 2)
    broken = replace(full, log_probs=full.log_probs * float("nan"))
    with vlmprune.patch(model, "fopru", keep=3) as handle:
        assert fidelity.compare(handle, inputs, full, 2)
        with pytest.raises(ValueError, match="another dtype"):
            fidelity.compare(handle, inputs, broken, 2)


# In sum


def row(picture, label="a, keep 1", prompt="p", seed=None, agrees=True, kl=0.0, first=True, tokens=4, **said):
    compared = Compared(first, agrees, kl / 2, kl, [], 10, tokens, tokens / 2)
    said = {"unpruned": "full", "pruned": "full" if agrees else "other"} | said
    return StudyRow(picture, prompt, label, seed, **said, compared=compared)


def entry(method="a", control=False, seeds=(None,)):
    return StudyEntry(method, {"keep": 1}, control, seeds)


def test_interval_by_hand():
    """With three pictures each extreme draw has 1/27 > 2.5 %: the interval ends at the pictures' own means."""
    rows = [row("x", kl=1.0, prompt="p"), row("x", kl=3.0, prompt="q"), row("y", kl=6.0), row("z", kl=4.0)]
    (line,) = fidelity.summarise([entry()], rows)
    found = line.measures["kl_answer"]
    assert found.value == pytest.approx(14 / 4)  # prompts count alike
    assert (found.low, found.high) == pytest.approx((2.0, 6.0))  # and not 1: x comes with both of its prompts
    assert (line.tokens_before, line.tokens_after, line.layer_average) == (10, 4, 2)


def test_interval_is_the_bootstrap_of_pictures():
    """Five pictures with different numbers of prompts: all 3125 draws, one by one."""
    kl = {"a": [0.1], "b": [0.5, 0.9], "c": [2.0], "d": [0.0, 0.2, 0.1], "e": [1.0]}
    rows = [row(name, kl=v, prompt=str(i)) for name, values in kl.items() for i, v in enumerate(values)]
    draws = [[v for name in chosen for v in kl[name]] for chosen in itertools.product(kl, repeat=5)]
    low, high = np.percentile([np.mean(draw) for draw in draws], [2.5, 97.5])
    (line,) = fidelity.summarise([entry()], rows)
    assert line.measures["kl_answer"].low == pytest.approx(low, abs=0.03)
    assert line.measures["kl_answer"].high == pytest.approx(high, abs=0.06)


def test_pictures_that_all_agree_prove_little():
    (line,) = fidelity.summarise([entry()], [row(name) for name in "wxyz"])
    found = line.measures["answer_agrees"]
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low**4 == pytest.approx(0.025)  # a share this low would agree four times in one of forty runs
    (line,) = fidelity.summarise([entry()], [row(name, agrees=False) for name in "wxyz"])
    assert (1 - line.measures["answer_agrees"].high) ** 4 == pytest.approx(0.025)
    assert line.measures["answer_agrees"].low == 0
    (line,) = fidelity.summarise([entry()], [row("x"), row("x", prompt="q")])
    assert line.measures["answer_agrees"] == Estimate(1.0, None, None)


def test_equal_values_have_an_interval_too():
    """Five pictures, half of each one's prompts changed: no draw differs from another, and yet little is known."""
    rows = [row(name, prompt=str(i), agrees=i == 0, kl=0.5) for name in "vwxyz" for i in range(2)]
    rows += [row(name, "random, keep 1", str(i), 0, agrees=False, kl=0.5) for name in "vwxyz" for i in range(2)]
    line, _ = fidelity.summarise([entry(), entry("random", True, (0,))], rows)
    found = line.measures["answer_agrees"]
    assert found.value == 0.5
    assert 0.05 < found.low < 0.2
    assert 0.8 < found.high < 0.95
    assert line.measures["kl_answer"] == Estimate(0.5, None, None)  # nothing bounds it
    assert line.over_random.value == 0.5
    assert line.over_random.low < 0.5 < line.over_random.high
    assert line.verdict == "noise"


def test_few_pictures_are_said_beside_the_number():
    lines = fidelity.summarise([entry()], [row(name) for name in "wxyz"])
    assert "only 4 pictures" in in_words(lines[0], 4)
    assert "only 1 picture:" in in_words(lines[0], 1)
    assert "only" not in in_words(lines[0], 20)


def test_difference_to_random_is_paired_and_seeds_are_averaged():
    control = entry("random", True, (0, 1))
    rows = []
    for i in range(30):
        easy = i % 2 == 0
        rows.append(row(f"{i}", agrees=easy or i % 3 == 0))
        rows += [row(f"{i}", "random, keep 1", seed=seed, agrees=easy and seed == 0) for seed in (0, 1)]
    first, second = fidelity.summarise([entry(), control], rows)
    assert first.measures["answer_agrees"].value == pytest.approx(20 / 30)
    assert second.measures["answer_agrees"].value == pytest.approx(7.5 / 30)
    assert first.over_random.value == pytest.approx(12.5 / 30)
    assert first.over_random.low > 0
    assert first.verdict == "better"
    assert (second.over_random, second.verdict) == (None, None)
    # seeds are no prompts: a picture's share is the mean of its seeds, and the pictures are 30
    alone = [row(f"{i}", "random, keep 1", agrees=i % 2 == 0) for i in range(30)]
    (same,) = fidelity.summarise([entry("random")], alone)
    assert second.measures["answer_agrees"].high < same.measures["answer_agrees"].high
    # the same values in other places: no pairing, no difference
    twin = [row(f"{i}", agrees=i % 2 == 0) for i in range(30)] + alone
    assert fidelity.summarise([entry(), entry("random")], twin)[0].verdict == "equal"
    noisy = [row(f"{i}", agrees=i % 2 == 1) for i in range(30)] + alone
    assert fidelity.summarise([entry(), entry("random")], noisy)[0].verdict == "noise"
    budget = StudyEntry("a", {"keep": 2})  # no control at this budget
    assert fidelity.summarise([budget, entry("random")], [row("x", "a, keep 2"), *alone])[0].over_random is None


def test_order_of_rows_means_nothing():
    random.seed(0)
    rows = [
        row(f"{i % 7}", label, str(i), seed, random.random() < 0.5, random.random())
        for i in range(40)
        for label, seed in (("a, keep 1", None), ("random, keep 1", 0), ("random, keep 1", 1))
    ]
    entries = [entry(), entry("random", True, (0, 1))]
    lines = fidelity.summarise(entries, rows)
    for _ in range(3):
        random.shuffle(rows)
        assert fidelity.summarise(entries, rows) == lines
        assert fidelity.worst(rows, 5) == fidelity.worst(sorted(rows, key=str), 5)


def test_scores_by_hand():
    """Three pictures: one is lost, one gained by half of the seeds, one is right in both; each is drawn 1 in 27."""
    labels = Labels("contains", {("x", "p"): ["a cat"], ("y", "p"): ["one", "two"], ("z", "p"): ["red"]})
    rows = [
        row("x", "random, keep 1", seed=0, unpruned="It is a cat.", pruned="a dog"),
        row("x", "random, keep 1", seed=1, unpruned="It is a cat.", pruned="a dog"),
        row("y", "random, keep 1", seed=0, unpruned="three", pruned="Two!"),
        row("y", "random, keep 1", seed=1, unpruned="three", pruned="four"),
        row("z", "random, keep 1", seed=0, unpruned="red", pruned="red"),
        row("z", "random, keep 1", seed=1, unpruned="red", pruned="red"),
    ]
    (line,) = fidelity.summarise([entry("random", True, (0, 1))], rows, labels)
    score = line.score
    assert (score.unpruned.value, score.pruned.value) == pytest.approx((2 / 3, 1.5 / 3))
    assert (score.pruned.low, score.pruned.high) == pytest.approx((0, 1))
    assert score.change.value == pytest.approx(-1 / 6)
    assert (score.change.low, score.change.high) == pytest.approx((-1, 0.5))  # x alone to y alone: paired
    assert score.verdict == "noise"
    assert fidelity.summarise([entry("random")], rows)[0].score is None
    kept = [row(name, unpruned="red", pruned="red") for name in "vwxyz"]
    (line,) = fidelity.summarise([entry()], kept, Labels("exact", {(name, "p"): ["Red."] for name in "vwxyz"}))
    assert (line.score.unpruned.value, line.score.change.value, line.score.verdict) == (1, 0, "equal")
    assert line.score.change.low < -0.3  # five pictures prove little


def test_what_loses_score_is_worst():
    rows = [
        row("a", kl=9.0, agrees=False, unpruned="no", pruned="never"),
        row("b", kl=0.1, agrees=False, unpruned="cat", pruned="dog"),
        row("c", kl=5.0, agrees=False, unpruned="dog", pruned="cat"),
    ]
    labels = Labels("exact", {(name, "p"): ["cat"] for name in "abc"})
    assert [r.picture for r in fidelity.worst(rows, 3)] == ["a", "c", "b"]
    assert [r.picture for r in fidelity.worst(rows, 3, labels)] == ["b", "a", "c"]


def test_worst():
    rows = [
        row("a", kl=0.5), row("b", kl=9.0), row("c", kl=0.1, agrees=False), row("d", kl=2.0, agrees=False),
        row("a", kl=3.0, prompt="q"), row("d", kl=1.0, prompt="q", agrees=False), row("e"), row("f", kl=0.2),
    ]  # fmt: skip
    for order in (rows, rows[::-1]):
        found = fidelity.worst(order, 10)
        assert [(r.picture, r.compared.kl_answer) for r in found] == [
            ("d", 2.0), ("c", 0.1), ("b", 9.0), ("a", 3.0), ("f", 0.2),
        ]  # fmt: skip
        assert [r.picture for r in fidelity.worst(order, 2)] == ["d", "c"]
    assert fidelity.worst(rows, 0) == []
