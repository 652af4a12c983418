"""The non-inferiority test: by hand, by simulation, and what it says of more pictures."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vlmprune.eval.tune.judge import bounds, judge, more_pictures


def test_nothing_lost_on_few_pictures_proves_little():
    found = judge([0.0] * 40, 0.01)
    assert (found.loss, found.answer) == (0, "open")
    # exact: the share that 40 pictures without a loss rule out is 1 - 0.05 ** (1 / 40)
    assert found.high == pytest.approx(1 - 0.05 ** (1 / 40))
    assert judge([0.0] * (40 + found.more), 0.01).answer == "yes"
    assert judge([0.0] * (40 + found.more - 1), 0.01).answer == "open"


def test_yes_no_and_open():
    assert judge([0.0] * 300, 0.01).answer == "yes"
    assert judge([1.0] * 20 + [0.0] * 20, 0.01).answer == "no"
    found = judge([1.0] * 2 + [0.0] * 98, 0.01)
    assert (found.answer, found.more) == ("open", None)  # the loss itself is over the limit


def test_gains_count_against_losses():
    assert judge([1.0] * 5 + [0.0] * 495, 0.02).high > judge([1.0] * 5 + [-1.0] * 5 + [0.0] * 490, 0.02).loss
    assert judge([-1.0] * 5 + [0.0] * 95, 0.01).answer == "yes"
    assert judge([-1.0] * 5 + [0.0] * 95, 0.01).loss == -0.05


def test_several_tested_beside_each_other_need_more():
    alone, many = judge([0.0] * 100, 0.05), judge([0.0] * 100, 0.05, tested=8)
    assert alone.high < many.high == pytest.approx(1 - (0.05 / 8) ** (1 / 100))


@pytest.mark.parametrize(("lost", "gained", "pictures"), [(0.01, 0.0, 60), (0.05, 0.0, 40), (0.1, 0.09, 80)])
def test_a_yes_is_wrong_in_no_more_than_one_of_twenty(lost, gained, pictures):
    """Losses whose true mean is the limit: yes would be wrong."""
    draws = np.random.default_rng(0).multinomial(pictures, [lost, gained, 1 - lost - gained], 4000).tolist()
    often = Counter((a, b) for a, b, _ in draws)
    wrong = sum(count for (a, b), count in often.items() if bounds(a, b, pictures, 0.05)[1] < lost - gained)
    assert wrong / 4000 <= 0.055


def test_fractions_are_parts_of_a_picture():
    assert judge([0.5] * 20 + [0.0] * 80, 0.3).loss == 0.1
    assert judge([0.5] * 20 + [0.0] * 80, 0.3).high == judge([1.0] * 10 + [0.0] * 90, 0.3).high


def test_no_number_of_pictures_helps_where_the_loss_is_the_limit():
    assert more_pictures(1, 0, 100, 0.01, 0.05) is None
    assert more_pictures(1, 0, 100, 0.02, 0.05) > 100


def test_a_bound_is_a_loss_that_there_can_be():
    found = judge([1.0, 1.0, 0.0, 1.0], 0.1, 40)
    assert (found.loss, found.high) == (0.75, 1.0)
    assert judge([-1.0] * 4, 0.1, 40).low == -1.0
