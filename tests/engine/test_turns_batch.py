"""Rows of a batch whose conversations go on with new images equal each conversation alone."""

from __future__ import annotations

import probes
import pytest
import reference
import torch
from conversations import (
    FEW,
    MODELS,
    ROWS,
    RULES,
    answered,
    caches,
    converse,
    count,
    expect,
    joined,
    moved,
    turns_of,
)
from probes import far, same
from tiny import CACHE

import vlmprune

F64 = torch.float64


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("options", [MODELS["llama"], MODELS["next"]], ids=["llama", "next"])
def test_rows_of_a_batch_go_on_like_prompts_alone(tiny_model, options, rules, kind):
    model, forced = tiny_model(dtype=F64, **options), probes.random_tokens(3, 3)
    rows = [turns_of(model, parts) for parts in ROWS]
    with vlmprune.patch(model, probes.rules(*rules)):
        for turns in (2, 3):
            got = converse(model, rows, kind, ["left"] * turns, forced)
            for i, row in enumerate(rows):
                said = answered(row[:turns], forced[i : i + 1, :1])
                each = [rules] * turns
                same(got[i], expect(model, said, each, forced[i : i + 1]))
                wrong = [moved(rules) if count(turn) else rules for turn in row[:turns]]
                far(got[i], expect(model, said, wrong, forced[i : i + 1]))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("rules", FEW.values(), ids=FEW)
def test_rows_of_a_batch_go_on_with_text_of_different_lengths(tiny_model, rules, kind):
    """Padding inside a row, which the masks of a static cache's later steps do not reach."""
    model, forced = tiny_model(dtype=F64), probes.random_tokens(3, 3)
    rows = [turns_of(model, [parts[0], ([2 + 3 * i], []), parts[1]]) for i, parts in enumerate(ROWS)]
    with vlmprune.patch(model, probes.rules(*rules)):
        for turns in (2, 3):  # and then with images
            got = converse(model, rows, kind, ["left"] * turns, forced)
            for i, row in enumerate(rows):
                said = answered(row[:turns], forced[i : i + 1, :1])
                same(got[i], expect(model, said, [rules] * turns, forced[i : i + 1]))


def test_beams_of_a_second_turn(tiny_model):
    """The first turn leaves a row per beam in the cache, all of one prompt."""
    model, rules = tiny_model(dtype=F64), RULES["several"]
    first, second = turns_of(model)[:2]
    cache = caches(model, "dynamic")
    with vlmprune.patch(model, probes.rules(*rules)), torch.no_grad():
        model(**{k: v.repeat_interleave(2, 0) for k, v in first.items()}, **{CACHE: cache})
        # `generate` hands pictures to beams by the placeholders that it is given: the new ones alone
        mask = joined([first, second])["attention_mask"]
        asked = second | {"attention_mask": mask}
        out = model.generate(
            **asked, num_beams=2, max_new_tokens=3, do_sample=False, **{CACHE: cache}, length_penalty=0.0,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
    tokens = out.sequences[0, asked["input_ids"].shape[1] :]
    for each, check in (([rules] * 2, same), ([rules, reference.wrong(rules)], far)):
        logits = expect(model, [first, second], each, tokens[None, :-1])
        check(out.sequences_scores.double(), logits.log_softmax(-1)[range(3), tokens].sum()[None], 1e-5)
