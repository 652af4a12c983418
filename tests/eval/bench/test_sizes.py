"""What a new picture size costs, with a clock that is handed in."""

from __future__ import annotations

import pytest
import tiny

from vlmprune import UnsupportedError
from vlmprune.engine.plan import Plan
from vlmprune.eval.bench import sizes
from vlmprune.eval.bench.report import sizes_text
from vlmprune.patches import family_of


def test_new_alike_and_known_sizes_are_told_apart(monkeypatch):
    """Tracing takes 8 s, knowing the packing 2 s, looking up 1 s."""
    model, now = tiny.shared(family="llava_next"), [0.0]
    met, known, real = set(), set(), Plan.grid

    def slow(plan, inner, modality, size):
        grid = real(plan, inner, modality, size)
        now[0] += 1 if size in known else 2 if id(grid) in met else 8
        known.add(size)
        met.add(id(grid))
        return grid

    monkeypatch.setattr(Plan, "grid", slow)
    monkeypatch.setattr(sizes, "draw", lambda count: [(240, 240), (300, 300), (240, 480), (480, 480)][:count])
    grids = [family_of(model).image_grid(model.model, size).tokens for size in sizes.draw(4)]
    assert grids[0] == grids[1] == grids[3] != grids[2]
    found = sizes.measure_sizes(model, 4, clock=lambda: now[0])
    assert (found["sizes"], found["layouts"]) == (4, 2)
    assert (found["packed_ms"]["median"], found["packed_ms"]["runs"]) == (8000, 2)
    assert (found["alike_ms"]["median"], found["alike_ms"]["runs"]) == (2000, 2)
    assert (found["known_ms"]["median"], found["known_ms"]["runs"]) == (1000, 4)
    assert found["new_ms"]["median"] == 5000
    text = " ".join(sizes_text(found).split())
    assert "A new picture size costs 5000 ±60% ms" in text
    assert "8000 ±0% where no earlier size packs alike, 2000 ±0% where one does, 1000 ±0% for a known size" in text
    assert "4 random sizes have 2 layouts" in text
    one = sizes_text(sizes.measure_sizes(model, 1, clock=lambda: now[0]))
    assert "where one does" not in one


def test_sizes_differ_and_are_drawn_alike_every_time():
    drawn = sizes.draw(50)
    assert len({*drawn}) == 50
    assert drawn == sizes.draw(50)
    assert all(200 <= side <= 1600 for size in drawn for side in size)


def test_families_of_one_layout_are_refused():
    with pytest.raises(UnsupportedError, match="all pictures of llava models have one layout"):
        sizes.measure_sizes(tiny.shared(), 3)
