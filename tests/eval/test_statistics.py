"""Intervals, verdicts, retention and the Pareto front, against what is known in closed form or by brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vlmprune.eval.statistics import (
    Estimate,
    Resampler,
    bounded_interval,
    difference,
    difference_interval,
    holm,
    interval,
    mean,
    pareto,
    retention,
    sign_flip,
    verdict,
)

numbers = st.floats(-100, 100, allow_nan=False)
samples = st.integers(2, 40).flatmap(
    lambda n: st.tuples(
        st.lists(st.sampled_from("abcdefgh"), min_size=n, max_size=n), arrays.arrays(float, (n, 2), elements=numbers)
    )
)
quick = settings(max_examples=40, deadline=None)


@quick
@given(samples)
def test_a_method_against_itself_is_exactly_zero(drawn):
    clusters, values = drawn
    resampler = Resampler(clusters, draws=50)
    same = resampler.means(clusters, values[:, 0]) - resampler.means(clusters, values[:, 0].copy())
    assert interval(same) == (0.0, 0.0)
    assert interval(resampler.means(clusters, values[:, 0] - values[:, 0])) == (0.0, 0.0)


@quick
@given(samples)
def test_paired_difference_is_the_difference_of_the_columns(drawn):
    clusters, values = drawn
    resampler = Resampler(clusters, draws=50)
    both = resampler.means(clusters, values)
    direct = resampler.means(clusters, values[:, 0] - values[:, 1])
    assert np.allclose(both[:, 0] - both[:, 1], direct, atol=1e-9)
    low, high = interval(direct)
    assert np.allclose(interval(-direct), (-high, -low), atol=1e-9)


@quick
@given(samples, st.randoms(use_true_random=False))
def test_the_order_of_samples_does_not_matter(drawn, random):
    clusters, values = drawn
    order = list(range(len(clusters)))
    random.shuffle(order)
    resampler = Resampler(clusters, draws=50)
    shuffled = resampler.means([clusters[i] for i in order], values[order])
    assert np.allclose(resampler.means(clusters, values), shuffled, atol=1e-9)


@quick
@given(samples, st.floats(0.1, 1000), numbers)
def test_scale_and_shift_carry_over(drawn, scale, shift):
    clusters, values = drawn
    resampler = Resampler(clusters, draws=50)
    plain = np.array(interval(resampler.means(clusters, values[:, 0])))
    moved = interval(resampler.means(clusters, scale * values[:, 0] + shift))
    assert np.allclose(scale * plain + shift, moved, rtol=1e-9, atol=1e-6)


def test_questions_that_repeat_a_picture_add_no_certainty():
    values = np.random.default_rng(0).random(50)
    names = [f"p{i}" for i in range(50)]
    once = Resampler(names).means(names, values)
    thrice = Resampler(names * 3).means(names * 3, np.tile(values, 3))
    assert np.allclose(once, thrice)
    single = [f"q{i}" for i in range(150)]  # as if they were independent: narrower by the square root of three
    loose = interval(Resampler(single).means(single, np.tile(values, 3)))
    low, high = interval(once)
    assert (high - low) / (loose[1] - loose[0]) == pytest.approx(math.sqrt(3), rel=0.1)


def test_large_samples_meet_the_normal_interval():
    values = np.random.default_rng(1).normal(5, 2, 4000)
    names = list(map(str, range(4000)))
    low, high = interval(Resampler(names).means(names, values))
    half = 1.96 * values.std() / math.sqrt(4000)
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_two_clusters_are_binomial():
    draws = Resampler("ab", draws=8000).means("ab", np.array([0.0, 1.0]))
    found = [np.mean(draws == value) for value in (0, 0.5, 1)]
    assert found == pytest.approx([0.25, 0.5, 0.25], abs=0.02)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng, covered, size = np.random.default_rng(2), 0, 60
    clusters = np.repeat([f"p{i}" for i in range(size)], 3)
    resampler = Resampler(clusters, draws=400)
    effects = rng.normal(0, 1, (size, 300)).repeat(3, 0) + rng.normal(0, 1, (3 * size, 300))  # true mean 0
    for column in resampler.means(clusters, effects).T:
        low, high = interval(column)
        covered += low <= 0 <= high
    assert 0.89 <= covered / 300 <= 0.99


def test_draws_do_not_depend_on_the_memory_they_may_take():
    resampler = Resampler(list(map(str, range(37))), draws=100)
    assert (np.concatenate(list(resampler.counts(7))) == np.concatenate(list(resampler.counts(200)))).all()
    assert (np.concatenate(list(resampler.counts())).sum(1) == 37).all()


def test_draws_without_any_sample_of_a_task_are_left_out():
    draws = Resampler("ab").means("a", np.array([3.0]))
    assert np.isnan(draws).mean() == pytest.approx(0.25, abs=0.03)
    assert interval(draws) == (3.0, 3.0)
    with pytest.raises(ValueError, match="no bootstrap draw"):
        interval(np.full(10, np.nan))


def test_verdicts():
    assert verdict(0.1, 0.3) == "better"
    assert verdict(-0.3, -0.1) == "worse"
    assert verdict(0.1, 0.3, higher_is_better=False) == "worse"
    assert verdict(-0.1, 0.3) == verdict(0.0, 0.3) == verdict(-0.3, 0.0) == "noise"
    assert verdict(0.0, 0.0) == verdict(-1e-16, 1e-16) == "equal"


def test_retention():
    assert retention(0.9, 0.9) == 1
    assert retention(1350.0, 1500.0) == pytest.approx(0.9)
    assert retention(20.0, 10.0, higher_is_better=False) == 0.5
    assert np.isnan(retention(0.5, 0.0))
    assert np.isnan(retention(-1.0, 2.0))
    assert retention(np.array([1.0, 3.0]), np.array([2.0, 2.0])).tolist() == [0.5, 1.5]


points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=15)


@quick
@given(points)
def test_pareto_front_is_what_nothing_dominates(drawn):
    costs, values = zip(*drawn, strict=True)
    beaten = [
        any(c2 <= c and v2 >= v and (c2 < c or v2 > v) for c2, v2 in drawn) for c, v in drawn
    ]  # fmt: skip
    front = pareto(costs, values)
    assert front.tolist() == [not b for b in beaten]
    assert front.any()
    assert (pareto(np.exp(costs), np.array(values) * 3 + 1) == front).all()


def test_unknown_points_are_never_on_the_front_and_beat_none():
    assert pareto([1, math.nan, 2], [1, 9, math.nan]).tolist() == [True, False, False]


# Where drawing again shows no spread


def binomial_tail(count, hits, share):
    """P(at least `hits` of `count`), term by term."""
    return sum(math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(hits, count + 1))


@pytest.mark.parametrize(("hits", "count"), [(1, 2), (1, 5), (4, 5), (3, 7), (25, 50), (1, 400)])
def test_the_exact_interval_is_clopper_and_pearsons(hits, count):
    draws = np.full(100, hits / count)
    low, high = bounded_interval(draws, hits / count, count, 0.0, 1.0)
    assert binomial_tail(count, hits, low) == pytest.approx(0.025, rel=1e-6)
    assert 1 - binomial_tail(count, hits + 1, high) == pytest.approx(0.025, rel=1e-6)


def test_the_exact_interval_at_the_ends_and_on_other_scales():
    assert bounded_interval(np.ones(9), 1.0, 5, 0.0, 1.0) == pytest.approx((0.025**0.2, 1.0))
    assert bounded_interval(np.zeros(9), 0.0, 5, 0.0, 1.0) == pytest.approx((0.0, 1 - 0.025**0.2))
    low, high = bounded_interval(np.full(9, 0.3), 0.3, 5, 0.0, 1.0)  # one and a half of five
    assert 0.0 < low < 0.3 < high < 1.0
    assert bounded_interval(np.full(9, 30.0), 30.0, 5, 0.0, 100.0) == pytest.approx((100 * low, 100 * high))
    assert bounded_interval(np.full(9, -0.4), -0.4, 5, -1.0, 1.0) == pytest.approx((2 * low - 1, 2 * high - 1))


def test_draws_with_a_spread_speak_for_themselves():
    draws = np.linspace(0.2, 0.4, 101)
    assert bounded_interval(draws, 0.3, 5, 0.0, 1.0) == interval(draws)
    assert difference_interval(draws, 0.3, 5, 1.0) == interval(draws)


def test_no_difference_anywhere_bounds_how_many_differ():
    low, high = difference_interval(np.zeros(9), 0.0, 10, 100.0)
    assert -low == high == pytest.approx(100 * (1 - 0.025**0.1))
    # five of five pictures better: a sign test does not reach 5 % with so few, and six do
    assert difference_interval(np.ones(9), 1.0, 5, 1.0)[0] < 0 < difference_interval(np.ones(9), 1.0, 6, 1.0)[0]


# One rule for both reports


def test_a_mean_has_the_interval_of_what_bounds_it():
    still, moving = np.full(9, 0.5), np.linspace(0.2, 0.4, 101)
    assert mean(None, 0.5, 1, 1.0) == Estimate(0.5)
    assert mean(moving, 0.3, 5, None) == mean(moving, 0.3, 5, 1.0) == Estimate(0.3, *interval(moving))
    assert mean(still, 0.5, 5, None) == Estimate(0.5)  # nothing bounds it
    assert mean(still + 1e-14 * np.arange(9), 0.5, 5, None) == Estimate(0.5)  # round-off is no spread
    assert mean(still, 0.5, 5, 1.0) == Estimate(0.5, *bounded_interval(still, 0.5, 5, 0.0, 1.0))


def test_a_difference_is_equal_only_where_no_sample_differs():
    none, some = np.zeros(9), np.linspace(0.2, 0.4, 101)
    assert difference(None, 0.1, 1, 1.0, same=False) == (Estimate(0.1), None)
    reach = difference_interval(none, 0.0, 9, 100.0)
    assert difference(none, 0.0, 9, 100.0, same=True) == (Estimate(0.0, *reach), "equal")
    assert difference(none, 0.0, 9, 100.0, same=False) == (Estimate(0.0, *reach), "noise")
    assert difference(none, 0.0, 9, None, same=True) == (Estimate(0.0), "equal")
    assert difference(none, 0.0, 9, None, same=False) == (Estimate(0.0), None)
    assert difference(some, 0.3, 9, 1.0, same=False) == (Estimate(0.3, *interval(some)), "better")
    assert difference(some, 0.3, 9, 1.0, same=False, higher_is_better=False)[1] == "worse"


def test_fisher_on_darwins_plants():
    """Fisher (1935), section 21: of 2**15 assignments, 1,726 have a sum as far from 0 as 15 pairs of plants had."""
    inches = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
    assert sign_flip(inches, parts=1) == 1726 / 2**15
    assert sign_flip([-x / 8 for x in inches], parts=8) == 1726 / 2**15


@quick
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9), st.sampled_from([1, 2, 3, 6]))
def test_signs_by_brute_force(steps, parts):
    values = np.array(steps, float) / parts
    signs = np.array(list(itertools.product((1, -1), repeat=len(values))))
    expected = np.mean(np.abs((signs * values).sum(1)) >= abs(values.sum()) - 1e-9)
    assert sign_flip(values) == pytest.approx(expected, abs=1e-12)


def test_an_exact_p_is_as_small_as_the_pairs_allow():
    assert sign_flip(np.ones(60)) == pytest.approx(2 / 2**60)
    assert sign_flip([1] * 6 + [0] * 50) == 2 / 2**6  # pairs without a difference decide nothing
    assert sign_flip([]) == sign_flip([0, 0]) == sign_flip([1, -1]) == 1


def test_holm_on_published_examples():
    # the one of the encyclopaedia (Holm-Bonferroni method)
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    # Neuhaus et al. (1992) in Benjamini & Hochberg (1995): with the familywise error controlled, three of 15 stay
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590]
    p = [*p, 1.0]
    assert holm(p)[:4] == pytest.approx([0.0015, 0.0056, 0.0247, 0.114])
    assert (holm(p) < 0.05).sum() == 3


@quick
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_no_less_than_p_and_keeps_the_order(p):
    adjusted = holm(p)
    assert np.all(adjusted >= np.array(p) - 1e-15)
    order = np.argsort(p, kind="stable")
    assert np.all(np.diff(adjusted[order]) >= 0)
    assert adjusted[order[0]] == pytest.approx(min(1, len(p) * min(p)))
