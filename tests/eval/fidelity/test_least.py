"""What a method must reach, of made-up sums."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vlmprune.eval.fidelity.least import Least
from vlmprune.runtime.errors import CommandError


def line(label, same=0.9, change=-0.02, control=False):
    return SimpleNamespace(
        entry=SimpleNamespace(label=label, control=control),
        measures={"answer_agrees": SimpleNamespace(value=same)},
        score=SimpleNamespace(change=SimpleNamespace(value=change)),
    )


def study(*lines, **fast):
    costs = {label: SimpleNamespace(first={"median": times}) for label, times in fast.items()}
    return SimpleNamespace(lines=lines, costs=costs)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ((0.9, 2.0, 0.02), None),
        ((None, None, None), None),
        ((0.91, None, None), "a: 0.900 of the answers stay the same, under 0.91"),
        ((None, 2.1, None), "a: the first token comes 2.00 times as fast, under 2.1"),
        ((None, None, 0.01), "a: the score loses 0.020, more than 0.01"),
        ((0.95, 3.0, None), "a: 0.900 of the answers stay the same, under 0.95; a: the first token comes 2.00 times"),
    ],
)
def test_a_method_that_is_not_as_good_as_asked_for_fails(asked, words):
    told = study(line("a"), line("grid", same=0.1, change=-0.9, control=True), a=2.0, grid=0.5)
    if words is None:
        Least(*asked).check(told)
        return
    with pytest.raises(CommandError) as error:
        Least(*asked).check(told)
    assert str(error.value).startswith(words)
    assert "grid" not in str(error.value)


def test_what_was_not_timed_is_not_too_slow():
    Least(None, 9.0, None).check(study(line("a")))
