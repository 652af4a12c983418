"""ShowUI: regions and what is kept of them, on pictures painted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

import vlmprune
from vlmprune import UnsupportedError
from vlmprune.methods import ShowUI
from vlmprune.parts import Pixels, kept_of_regions, regions

F64 = torch.float64


def painted(model, rows, noise=0.0):
    """A prompt whose one picture has 4 x 4 patches, each in the colour of its letter."""
    prompt = tiny.prompt(model, [3, "image", 5], [(24, 24)])
    colours = {letter: i for i, letter in enumerate(sorted(set("".join(rows))))}
    table = torch.tensor([[float(colours[letter]) for letter in row] for row in rows])
    pixels = table.repeat_interleave(6, 0).repeat_interleave(6, 1).expand(3, 24, 24).clone()
    return prompt | {"pixel_values": (pixels + noise * torch.rand(3, 24, 24)).to(model.dtype)[None]}


ROWS = ["aaab", "aacb", "aaab", "dddd"]


@torch.no_grad()
def test_of_every_region_a_part_stays():
    model = tiny.shared(dtype=F64)
    # a: 0 1 2 4 5 8 9 10 (8), b: 3 7 11 (3), c: 6, d: 12..15; half of each, evenly spaced
    a, b, d = [0, 1, 2, 4, 5, 8, 9, 10], [3, 7, 11], [12, 13, 14, 15]
    want = [a[0], a[2], a[5], a[7], b[0], b[2], 6, d[0], d[3]]  # of 3: 3 - round(1.5) = 1, to the even 2 going
    want = [t for t in want if t != b[2]]
    with vlmprune.patch(model, "showui") as handle:
        model(**painted(model, ROWS))
        assert handle.trace.kept_patches() == sorted(want)
        assert handle.trace.cuts[0].positions == "original"
        model(**painted(model, ROWS, noise=0.05))  # still under the difference
        assert handle.trace.kept_patches() == sorted(want)
        model(**painted(model, ["abcd", "efgh", "ijkl", "mnop"]))
        assert len(handle.trace.kept_patches()) == 16
    with vlmprune.patch(model, "showui", difference=100.0, ratio=1.0) as handle:
        model(**painted(model, ROWS))
        assert handle.trace.kept_patches() == [0]  # one region


def test_spacing_keeps_what_it_says():
    for size in range(1, 40):
        label = np.zeros(size, dtype=int)
        for gone in range(size):
            kept = kept_of_regions(label, gone / size, None)
            assert int(kept.sum()) == max(1, size - round(gone / size * size))
            assert kept[0]
            assert kept[-1] or int(kept.sum()) == 1


def test_a_budget_is_met():
    label = np.array([0] * 9 + [9] + [10] * 5)
    for budget in range(1, 16):
        kept = kept_of_regions(label, 0.5, budget)
        assert int(kept.sum()) == budget
    assert kept_of_regions(label, 0.5, 3).nonzero()[0].tolist() == [0, 9, 10]
    assert kept_of_regions(label, 0.5, 2).nonzero()[0].tolist() == [0, 10]  # the largest


def test_where_nothing_is_flat_a_budget_is_spread_over_the_picture():
    """Every patch its own region: the first so many would be the picture's top rows."""
    for size in (16, 256):
        for budget in range(1, size + 1):
            kept = kept_of_regions(np.arange(size), 0.5, budget).nonzero()[0]
            assert len(kept) == budget
            assert budget == 1 or (kept[0], kept[-1]) == (0, size - 1)
            assert len(kept) < 2 or np.ptp(np.diff(kept)) <= 1
    label = np.array([0, 0, 0, *range(3, 20), 20, 20])  # the two flat ones, then of 17 others the ends and the middle
    assert kept_of_regions(label, 0.5, 5).nonzero()[0].tolist() == [0, 3, 11, 19, 20]


def test_regions():
    ring = torch.tensor([[0, 1], [1, 2], [2, 3], [5, 4], [6, 5], [7, 6], [4, 7]])
    assert regions(9, ring.numpy()).tolist() == [0, 0, 0, 0, 4, 4, 4, 4, 8]
    snake = torch.stack((torch.arange(0, 99), torch.arange(1, 100)), 1).flip(0)
    assert regions(100, snake.numpy()).tolist() == [0] * 100
    assert regions(3, snake.numpy()[:0]).tolist() == [0, 1, 2]


def test_pixels_of_patches():
    picture = torch.arange(2 * 3 * 25 * 24).view(2, 3, 25, 24).float()
    got = Pixels.of(picture, 16)
    assert got.shape == (2, 16, 3 * 6 * 6)
    assert torch.equal(got[1, 6], picture[1, :, 6:12, 12:18].flatten())


@torch.no_grad()
def test_refusals():
    model = tiny.shared(dtype=F64)
    prompt = painted(model, ROWS)
    with pytest.raises(ValueError, match="skipping layers for some tokens"):
        vlmprune.patch(model, "showui", layers=(1, 28, 0))
    both = [vlmprune.registry.find("random")(keep=0.5), ShowUI()]
    with vlmprune.patch(model, both), pytest.raises(UnsupportedError, match="put showui first"):
        model(**prompt)
