"""HiPrune beside the cases of the published code (test_goldens_baselines.py)."""

from __future__ import annotations

import pytest
import torch
from probes import anyres, hand_layout, kept, raster

from vlmprune.methods import HiPrune
from vlmprune.parts import neighbours

SIDE = hand_layout(raster(4, 5))


def near(places, wrap=False, layout=SIDE):
    marked = torch.zeros(len(layout), layout.width, dtype=torch.bool)
    marked[0, places] = True
    return neighbours(marked, layout, wrap)[0].nonzero().flatten().tolist()


def test_neighbours_are_left_right_above_and_below():
    assert near([6]) == [1, 5, 7, 11]
    assert near([0]) == [1, 5]  # nothing around the edge
    assert near([9]) == [4, 8, 14]
    assert near([19]) == [14, 18]


def test_those_of_the_released_code_wrap():
    assert near([6], wrap=True) == [1, 5, 7, 11]
    assert near([9], wrap=True) == [4, 8, 10, 14]  # the next row's first
    assert near([3], wrap=True) == [0, 2, 4, 8]  # above the first row is clamped to the first patch


def test_neighbours_across_the_seam_of_two_crops():
    grid = anyres(40, 24)  # a thumbnail, and two crops one above the other
    layout, (rows, _) = hand_layout(grid), grid.planes[1]
    places = zip(grid.plane.tolist(), grid.row.tolist(), grid.col.tolist(), grid.newline.tolist(), strict=True)
    at = {place: token for token, (*place, newline) in enumerate(places) if not newline for place in [tuple(place)]}
    for row in range(rows):
        want = [at[1, r, c] for r, c in ((row - 1, 1), (row, 0), (row, 2), (row + 1, 1)) if (1, r, c) in at]
        assert near([at[1, row, 1]], layout=layout) == sorted(want)
    assert len({int(grid.view[at[1, row, 1]]) for row in range(rows)}) == 2  # there is a seam


def test_objects_with_their_surroundings_then_what_is_looked_at():
    shallow, deep = torch.zeros(1, 20), torch.linspace(0.1, 0.9, 20)[None]
    shallow[0, 6] = 1
    method = HiPrune(keep=8, alpha=0.6)  # round(8 * 0.6 / 5) = 1 anchor
    assert kept(method.reduce({0: shallow, 1: deep}, SIDE)) == [1, 5, 6, 7, 11, 17, 18, 19]
    none = HiPrune(keep=8, alpha=0)
    assert kept(none.reduce({0: shallow, 1: deep}, SIDE)) == list(range(12, 20))
    tight = HiPrune(keep=3, alpha=1)  # neighbours are more than there is room for: by what the deep layer says
    assert kept(tight.reduce({0: shallow, 1: deep}, SIDE)) == [6, 7, 11]


@pytest.mark.parametrize("layer", [0, 25, 1.5, "9"])
def test_bad_layers(layer):
    with pytest.raises(ValueError, match=r"object_layer=.* must be a layer from 1 to 24"):
        HiPrune(keep=4, object_layer=layer)
