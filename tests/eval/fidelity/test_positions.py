"""Agreement by position in the answer, by hand."""

from __future__ import annotations

import pytest

from vlmprune.eval.fidelity.measure import Compared, StudyRow, stretches
from vlmprune.eval.fidelity.positions import along


def row(picture, parts, same_for, agrees=False, seed=None, prompt="p"):
    compared = Compared(True, agrees, 0.0, 0.0, [], 10, 4, 4.0, same_for, tuple(parts))
    return StudyRow(picture, prompt, "a", seed, "x", "y", compared)


def test_stretches_double():
    assert stretches(1) == [(1, 1)]
    assert stretches(6) == [(1, 1), (2, 2), (3, 4), (5, 8)]
    assert stretches(8) == stretches(5)
    assert len(stretches(512)) == 10


def test_by_hand():
    rows = [
        row("x", [(1, 1, 0.1), (1, 1, 0.2), (2, 1, 0.6), (2, 0, 4.0)], 2),  # six tokens, two the same
        row("y", [(1, 1, 0.3), (1, 0, 0.4)], 2, agrees=True),  # two tokens and their end: the same to the end
        row("z", [(1, 0, 0.5), (1, 1, 0.0), (1, 1, 0.2)], 0),
    ]
    first, second, third, last = along(rows)["a"]
    assert [(one.first, one.last, one.prompts) for one in (first, second, third, last)] == [
        (1, 1, 3), (2, 2, 3), (3, 4, 2), (5, 8, 1),
    ]  # fmt: skip
    assert [one.next_agrees.value for one in (first, second, third, last)] == pytest.approx([2 / 3, 2 / 3, 0.75, 0])
    assert [one.kl.value for one in (first, second, third, last)] == pytest.approx([0.3, 0.2, 0.25, 2.0])
    assert [one.same_so_far.value for one in (first, second, third, last)] == pytest.approx(
        [2 / 3, 2 / 3, 1 / 3, 1 / 3]
    )
    assert (first.next_agrees.low, first.next_agrees.high) == (0, 1)  # over pictures, each one alone 1 in 27
    assert last.next_agrees.low is None  # one picture


def test_seeds_are_one_prompt():
    seeds = [
        row("x", [(1, 1, 0.2)], 1, True, 0),
        row("x", [(1, 0, 0.6)], 0, False, 1),
        row("y", [(1, 1, 0.0)], 1, True, 0),
    ]
    (one,) = along(seeds)["a"]
    assert (one.prompts, one.next_agrees.value, one.same_so_far.value) == (2, 0.75, 0.75)
    assert one.kl.value == pytest.approx(0.2)


def test_nothing_was_said():
    assert along([row("x", [], 0)]) == {"a": []}
