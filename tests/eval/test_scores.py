"""How right an answer is."""

from __future__ import annotations

import pytest

from vlmprune.eval.scores import score


@pytest.mark.parametrize(
    ("metric", "said", "wanted", "value"),
    [
        ("exact", "A  Cat.", ["a cat"], 1),
        ("exact", "a cat sits", ["a cat"], 0),
        ("exact", "dog", ["cat", "Dog"], 1),
        ("contains", "It is a cat, I think", ["a cat"], 1),
        ("contains", "category", ["cat"], 0),
        ("anls", "tokyo", ["Tokio"], 0.8),
        ("anls", "paris", ["Tokio"], 0),
        ("anls", "", ["x"], 0),
        ("choice", "B. the cat", ["b"], 1),
        ("choice", "(C)", ["B"], 0),
        ("choice", "the answer is b", ["B"], 1),
        ("choice", "Because", ["B"], 0),
    ],
)
def test_by_hand(metric, said, wanted, value):
    assert score(metric, said, wanted) == pytest.approx(value)
