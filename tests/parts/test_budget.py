"""From a user's `keep` to counts."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import probes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.methods import GlobalCom2, ToMe, TransPrune
from vlmprune.parts.budget import check_keep, count, share
from vlmprune.parts.cells import grid_shape
from vlmprune.parts.facts import ModelFacts
from vlmprune.parts.layout import ImageGrid

fast = settings(max_examples=200, deadline=None, derandomize=True)
totals = st.lists(st.integers(0, 700), min_size=1, max_size=6)
fractions = st.floats(1e-6, 1.0)


@pytest.mark.parametrize(
    "bad", [0, -1, 0.0, -0.5, 1.5, 64.0, math.nan, math.inf, -math.inf, np.float32(2), np.int64(0)]
)
def test_values_out_of_range(bad):
    with pytest.raises(ValueError, match="keep"):
        check_keep(bad)


@pytest.mark.parametrize("bad", ["64", "0.5", None, True, False, [4], (4,), 1j, np.bool_(True), torch.tensor(4), b"4"])
def test_values_that_are_no_numbers(bad):
    with pytest.raises(TypeError, match="keep"):
        check_keep(bad)


def test_a_large_float_is_explained():
    with pytest.raises(ValueError, match="keep=64"):
        check_keep(64.0)


@pytest.mark.parametrize(
    ("given", "kind", "value"),
    [(1, int, 1), (64, int, 64), (np.int32(7), int, 7), (np.uint8(7), int, 7), (1.0, float, 1.0), (0.25, float, 0.25),
     (np.float64(0.5), float, 0.5), (np.float32(0.5), float, 0.5), (Fraction(1, 4), float, 0.25)],
)  # fmt: skip
def test_numbers_of_all_kinds(given, kind, value):
    got = check_keep(given)
    assert type(got) is kind
    assert got == value


def test_decimals_are_refused_or_right():
    try:
        assert check_keep(Decimal("0.25")) == 0.25
    except TypeError as refused:
        assert "keep" in str(refused)  # noqa: PT017


@pytest.mark.parametrize(
    ("keep", "total", "want"),
    [(64, 576, 64), (600, 576, 576), (0.1, 576, 57), (0.25, 576, 144), (1.0, 576, 576), (0.002, 576, 1), (0.3, 16, 4),
     (1, 1, 1), (0.5, 1, 1), (5, 0, 0), (0.5, 0, 0), (1.0, 729, 729), (0.999, 10, 9)],
)  # fmt: skip
def test_count(keep, total, want):
    assert count(keep, total) == want


@fast
@given(keep=fractions | st.integers(1, 1000), total=st.integers(0, 5000))
def test_counts_are_within_what_is_there(keep, total):
    got = count(keep, total)
    assert min(1, total) <= got <= total
    if isinstance(keep, float):
        assert got == max(min(1, total), math.floor(total * keep + 1e-9))


@pytest.mark.parametrize(
    ("keep", "total", "want"), [(0.7, 2880, 2016), (0.29, 100, 29), (0.57, 100, 57), (1 / 3, 3, 1)]
)
def test_a_fraction_is_what_arithmetic_says(keep, total, want):
    assert math.floor(total * keep) == want - 1 or keep == 1 / 3  # what floats make of it
    assert count(keep, total) == want
    assert share(keep, [total, total]) == [want, want]


@fast
@given(digits=st.integers(1, 10_000), total=st.integers(1, 20_000))
def test_decimals_are_floored_exactly(digits, total):
    assert count(digits / 10_000, total) == max(1, digits * total // 10_000)


def test_every_method_floors_alike():
    """`grid` and `transprune` gave 2016 where all others gave 2015."""
    facts = ModelFacts("llava", 24, 22, True, decoder_layers=32, views=False, view_patches=2880)
    ratios = TransPrune(keep_ratios=(0.9, 0.8, 0.7))
    assert [probes.left(ratios, 2880, stage) for stage in range(3)] == [2592, 2304, 2016]
    assert probes.left(TransPrune(keep=0.7), 2880, 2) == count(0.7, 2880) == 2016
    (*_, last) = ToMe(keep=0.7).cuts(facts)
    assert last.reduce.keywords["clusters"] == 2016
    assert grid_shape(count(0.49, 100), 10, 10) == (7, 7)


def test_globalcom2_floors_like_the_others():
    view = torch.tensor([0] * 100 + [1] * 100)
    row, col = torch.arange(100) // 10, torch.arange(100) % 10
    grid = ImageGrid(
        source=torch.arange(200), view=view, plane=view, row=row.repeat(2), col=col.repeat(2),
        newline=torch.zeros(200, dtype=torch.bool), line=torch.zeros(200).long(), planes=((10, 10), (10, 10)), views=2,
        side=(10, 10), crops=(1, 1), frames=0, apart=False, centre=torch.stack((row, col), -1).repeat(2, 1).double(),
        pitch=((1, 1), (1, 1)),
    )  # fmt: skip
    scores = torch.rand(200, generator=torch.Generator().manual_seed(0))
    kept, _ = GlobalCom2(keep=0.29).choose(scores, grid)  # 100 * 0.29 is 28.999999999999996
    assert (int(kept[:100].sum()), int(kept[100:].sum())) == (29, 29)


@fast
@given(keep=st.integers(1, 3000), totals=totals)
def test_shares_of_a_count_add_up(keep, totals):
    parts = share(keep, totals)
    assert sum(parts) == min(keep, sum(totals))
    assert all(0 <= p <= t for p, t in zip(parts, totals, strict=True))
    if keep < sum(totals):
        # largest remainder: nobody is off by one or more
        assert all(abs(p - keep * t / sum(totals)) < 1 for p, t in zip(parts, totals, strict=True))
        up = [keep * t / sum(totals) % 1 for p, t in zip(parts, totals, strict=True) if p > keep * t / sum(totals)]
        down = [keep * t / sum(totals) % 1 for p, t in zip(parts, totals, strict=True) if p < keep * t / sum(totals)]
        assert not up or not down or min(up) >= max(down) - 1e-9


@fast
@given(keep=fractions, totals=totals)
def test_shares_of_a_fraction_are_each_views_own(keep, totals):
    assert share(keep, totals) == [count(keep, total) for total in totals]


@pytest.mark.parametrize(
    ("keep", "totals", "want"),
    [(10, [16, 16], [5, 5]), (5, [16, 16], [3, 2]), (10, [16, 32, 16], [3, 5, 2]), (3, [10, 10, 10, 10], [1, 1, 1, 0]),
     (7, [0, 7], [0, 7]), (99, [16, 16], [16, 16]), (1, [1, 100], [0, 1])],
)  # fmt: skip
def test_share(keep, totals, want):
    assert share(keep, totals) == want
