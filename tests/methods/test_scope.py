"""SCOPE: saliency times coverage, by hand."""

from __future__ import annotations

import pytest
import torch
from probes import anyres, hand_layout, kept, raster

from vlmprune.methods import Scope

FEATURES = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.3], [0.0, 1.0], [-1.0, 0.2], [-0.9, 0.1]])


def by_hand(features, row, keep, alpha=1.0):
    """Loops over pairs of patches."""
    unit = [x / x.norm() for x in features]
    covered, order = [0.0] * len(unit), []
    for _ in range(keep):
        worth = {}
        for j in (j for j in range(len(unit)) if j not in order):
            gain = sum(max(0.0, float(unit[i] @ unit[j]) - covered[i]) for i in range(len(unit)))
            worth[j] = gain * float(row[j]) ** alpha
        order.append(max(worth, key=worth.get))
        covered = [max(c, float(u @ unit[order[-1]])) for c, u in zip(covered, unit, strict=True)]
    return sorted(order)


@pytest.mark.parametrize("alpha", [0, 0.5, 1, 2])
@pytest.mark.parametrize("keep", [1, 2, 3, 4])
def test_patches_are_those_by_hand(keep, alpha):
    row = torch.tensor([0.1, 0.1, 0.2, 0.05, 0.15, 0.4])
    layout = hand_layout(raster(2, 3))
    got = kept(Scope(keep=keep, alpha=alpha).reduce({0: FEATURES[None], 1: row[None]}, layout))
    assert got == by_hand(FEATURES, row, keep, alpha)


def test_without_saliency_the_first_stands_for_most():
    layout = hand_layout(raster(2, 3))
    assert kept(Scope(keep=1, alpha=0).reduce({0: FEATURES[None], 1: torch.ones(1, 6)}, layout)) == [2]
    peaked = torch.tensor([[0.0, 0, 0, 1, 0, 0]])
    assert kept(Scope(keep=1).reduce({0: FEATURES[None], 1: peaked}, layout)) == [3]


def test_newlines_are_neither_chosen_nor_covered():
    grid = anyres(40, 24)
    layout = hand_layout(grid)
    g = torch.Generator().manual_seed(0)
    features, row = torch.randn(1, grid.tokens, 6, generator=g), torch.rand(1, grid.tokens, generator=g)
    plain = Scope(keep=5).reduce({0: features, 1: row}, layout).keep
    loud = features.clone()
    loud[0, grid.newline] = 50 * features[0, 3]
    again = Scope(keep=5).reduce({0: loud, 1: row.masked_fill(grid.newline, 9.0)}, layout).keep
    assert torch.equal(plain, again)
    assert int((plain[0] & ~grid.newline).sum()) == 5


@pytest.mark.parametrize("alpha", [-1, "1", None, True])
def test_bad_powers(alpha):
    with pytest.raises(ValueError, match=r"alpha=.* must be a number of at least 0"):
        Scope(keep=4, alpha=alpha)
