"""HoloV: shares of slices, and what becomes of what a slice has no room for."""

from __future__ import annotations

import pytest
import torch
from probes import hand_layout, kept, raster

from vlmprune.methods import HoloV
from vlmprune.methods.holov import shared_out, slice_scores, slices


def test_slices_are_of_consecutive_patches_the_first_ones_longer():
    own = slices(torch.ones(1, 36, dtype=torch.bool))[0]
    assert own.bincount().tolist() == [3] * 4 + [2] * 12
    assert own.tolist() == sorted(own.tolist())
    some = torch.arange(40) % 2 > 0
    assert slices(some[None])[0][some].bincount().tolist() == [2] * 4 + [1] * 12
    assert slices(torch.ones(1, 5, dtype=torch.bool))[0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("keep", [1, 7, 16, 20, 35, 36])
def test_shares_add_up(keep):
    g = torch.Generator().manual_seed(keep)
    scores, sizes = torch.rand(3, 16, generator=g) ** 6, torch.tensor([[3] * 4 + [2] * 12] * 3)
    part = shared_out(scores, sizes, torch.full((3,), keep))
    assert part.sum(1).tolist() == [keep] * 3
    assert (part <= sizes).all()
    lost = shared_out(scores, sizes, torch.full((3,), keep), fill=False)
    assert (lost <= part).all()
    assert keep < 7 or bool((lost.sum(1) < keep).any())


def test_excess_goes_to_the_best_slices_with_room():
    scores = torch.tensor([[90.0, 6, 4]])
    assert shared_out(scores, torch.tensor([[2, 3, 3]]), torch.tensor([6])).tolist() == [[2, 3, 1]]


def test_a_slice_is_worth_its_attention_and_how_unevenly_it_is_alike():
    features, row = torch.tensor([[1.0, 0], [0, 1], [1, 0], [9, 9]]), torch.tensor([0.1, 0.3, 0.2, 9])
    real = torch.tensor([True, True, True, False])
    cosine = [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    mean = [sum(c) / 2 for c in cosine]
    spread = [sum((x - m) ** 2 for x in c) / 2 for c, m in zip(cosine, mean, strict=True)]
    look = [100, 300, 200]
    balance = (sum(look) / 3) / (sum(spread) / 3 + 1e-6)
    want = sum(x + 0.09 * s * balance for x, s in zip(look, spread, strict=True)) / 3
    torch.testing.assert_close(slice_scores(features, row, real), torch.tensor(want))


def test_what_stays_and_what_the_released_code_makes_of_it():
    layout, features = hand_layout(raster(4, 8)), torch.randn(1, 32, 6, generator=torch.Generator().manual_seed(0))
    row = torch.full((1, 32), 1e-4)
    row[0, 5], row[0, 4] = 0.9, 0.05  # slices of two: the third has nearly all attention
    mine = HoloV(keep=8).reduce({0: features, 1: row}, layout)
    assert len(kept(mine)) == 8
    assert {4, 5} < set(kept(mine))
    old = HoloV(keep=8, parity="released").reduce({0: features, 1: row}, layout)
    assert kept(old) == list(range(8))
    tokens = int(old.merge.weight[0, :8].sum())
    assert tokens < 8  # the rest are zeros
    assert old.merge.source[0, :2].tolist() == [5, 4]
    assert set(old.merge.source[0, :tokens].tolist()) <= set(kept(mine))
