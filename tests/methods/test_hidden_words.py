"""Text that the mask hides, wherever it stands: a method chooses as if it were not there (ToDRE: test_todre_text)."""

from __future__ import annotations

import probes
import pytest
import tiny
import torch

import vlmprune
from vlmprune.parts.taps import last_rows

F64 = torch.float64


def without(prompt, columns):
    """The prompt with some columns hidden by its mask, and the same prompt without them."""
    hidden = prompt | {"attention_mask": prompt["attention_mask"].clone()}
    hidden["attention_mask"][0, columns] = 0
    stay = [c for c in range(prompt["input_ids"].shape[1]) if c not in columns]
    short = prompt | {name: prompt[name][:, stay] for name in ("input_ids", "attention_mask")}
    return hidden, short


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("transprune", {}),
        ("transprune", {"mode": "paper"}),
        ("fastv", {"keep": 7}),
        ("atp", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("where", [[22], [21, 24], [20, 22, 25], [1, 23]], ids=str)
def test_hidden_words_have_no_say(name, options, where):
    """Behind the image (columns 20 to 25), and in front of it too."""
    model = tiny.shared(dtype=F64)
    options = {"thresholds": tiny.modules(model)} if name == "atp" else options
    changed = 0
    for seed in range(3):
        full = tiny.prompt(model, [4, "image", 6], [(24, 24)], seed=seed)
        hidden, short = without(full, where)
        with torch.no_grad(), vlmprune.patch(model, name, **options) as handle:
            kept = []
            for prompt in (hidden, short, full):
                out = model(**probes.step_inputs(prompt)).logits[0, -1]
                kept.append(([handle.trace.kept(0, cut) for cut in range(len(handle.trace.cuts))], out))
        assert kept[0][0] == kept[1][0]
        probes.same(kept[0][1], kept[1][1])
        changed += kept[0][0] != kept[2][0]
    assert changed, "these words would have a say"


def test_last_rows():
    real = torch.tensor([[0, 1, 1, 0, 1, 0, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1]]).bool()
    at, weight = last_rows(real, torch.tensor([4, 2, 0]), 4)
    assert [row[w > 0].tolist() for row, w in zip(at, weight, strict=True)] == [[2, 4, 6, 7], [2, 3], [7]]
    assert weight.sum(1).tolist() == [1, 1, 1]
    assert real.gather(1, at).all(), "rows without weight see something too"
