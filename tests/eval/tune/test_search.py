"""Successive halving."""

from __future__ import annotations

from vlmprune.eval.tune.search import Standing, better_half, rungs


def test_pictures_double_while_candidates_halve():
    assert rungs(64, 40) == [8, 16, 32, 64]
    assert rungs(64, 10) == [16, 32, 64]
    assert rungs(1000, 4) == [1000]
    assert rungs(10, 40) == [10]


def test_the_fast_enough_go_first_by_their_loss():
    standings = [Standing(str(i), 2.5, i / 10) for i in range(6)] + [
        Standing(f"slow{i}", 1 + i / 10, 0) for i in range(6)
    ]
    assert better_half(standings, 2) == [str(i) for i in range(6)]
    assert better_half(standings[3:], 2) == ["3", "4", "5", "slow5", "slow4"]


def test_the_hopeless_go_and_finalists_stay():
    standings = [Standing("bad", 9, 0.9, hopeless=True)] + [Standing(str(i), 3, i) for i in range(5)]
    assert better_half(standings, 2) == ["0", "1", "2", "3"]
    assert better_half([Standing("bad", 9, 0.9, hopeless=True)], 2) == []
