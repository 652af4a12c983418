"""Layouts of a long-running process: bounded, shared by sizes that pack alike, and still those of the model."""

from __future__ import annotations

import copy
import pickle
import random
from threading import Thread

import pytest
import tiny
import torch

import vlmprune
from vlmprune.engine.plan import Plan
from vlmprune.parts.packing import Layouts, Packing
from vlmprune.parts.tracing import trace_packing
from vlmprune.patches import family_of

FIELDS = ("source", "view", "plane", "row", "col", "newline", "centre")


def plan_of(model):
    family = family_of(model)
    return Plan(family, family.facts(model.model), [])


def same_grid(a, b):
    assert (a.planes, a.views, a.side, a.crops, a.frames, a.pitch) == (
        b.planes,
        b.views,
        b.side,
        b.crops,
        b.frames,
        b.pitch,
    )
    for name in FIELDS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert (a.blend is None) == (b.blend is None)
    if a.blend is not None:
        assert torch.equal(a.blend[0], b.blend[0])
        torch.testing.assert_close(a.blend[1], b.blend[1])


def sizes(count, seed=0):
    generator = random.Random(seed)
    return [(generator.randint(1, 300), generator.randint(1, 300)) for _ in range(count)]


@pytest.mark.parametrize(
    ("family", "tower"), [("llava_next", "clip"), ("llava_onevision", "siglip"), ("llava", "clip")]
)
def test_what_is_shared_is_what_would_be_traced(family, tower):
    """Sizes share a layout exactly where a layout of their own would be equal."""
    model = tiny.shared(family=family, tower=tower)
    plan, met = plan_of(model), {}
    for size in sizes(60) if family != "llava" else [None]:
        grid, own = plan.grid(model.model, "image", size), family_of(model).image_grid(model.model, size)
        same_grid(grid, own)
        assert plan.grid(model.model, "image", size) is grid
        told = (own.tokens, own.centre.numpy().tobytes(), own.source.numpy().tobytes(), own.crops)
        assert met.setdefault(told, grid) is grid, "an equal layout was traced again"
    assert len(plan.layouts) == min(len(met), 64)
    assert len(met) < 60


def test_videos_have_layouts_of_their_own():
    model = tiny.shared(family="llava_onevision", tower="siglip")
    plan = plan_of(model)
    for frames in (1, 2, 3):
        same_grid(plan.grid(model.model, "video", frames), family_of(model).video_grid(model.model, frames))
    assert len(plan.layouts) == 3


def test_five_thousand_sizes_stay_within_bounds():
    model = tiny.shared(family="llava_next")
    plan = plan_of(model)
    plan.layouts = Layouts(sizes=100, layouts=4)
    for size in sizes(600):
        plan.grid(model.model, "image", size)
        assert len(plan.layouts) <= 4
        assert len(plan.layouts.sizes) <= 100
    assert (Layouts().most_sizes, Layouts().most_layouts) == (4096, 64)


def strip(width, calls):
    """A packing that keeps the first `width` patches, and counts its calls."""

    def pack(views, newline):
        calls.append(width)
        return views[0, :width]

    return Packing(pack, 1, 4, 4, (1, 1))


def test_what_was_used_longest_ago_goes_first():
    layouts, calls = Layouts(sizes=10, layouts=2), []
    for width in (4, 8, 4, 12):  # 8 goes
        layouts.find(width, lambda width=width: strip(width, calls))
    for width, again in ((4, 0), (12, 0), (8, 2)):  # one pass to know the packing, one to trace it
        calls.clear()
        assert layouts.find(width, lambda width=width: strip(width, calls)).tokens == width
        assert len(calls) == again
    # another size of a known packing is not traced
    calls.clear()
    layouts.find("another", lambda: strip(8, calls))
    assert len(calls) == 1
    # a forgotten size whose layout is there
    small = Layouts(sizes=1, layouts=5)
    first = small.find("a", lambda: strip(4, calls))
    small.find("b", lambda: strip(8, calls))
    assert small.find("a", lambda: strip(4, calls)) is first


def test_order_matters_in_a_packing():
    """The same patches in another order are another layout."""
    keys = [Packing(pack, 1, 4, 4, (1, 1)).key() for pack in (lambda x, n: x[0], lambda x, n: x[0].flip(0))]
    assert keys[0] != keys[1]
    assert keys[0] == Packing(lambda x, n: x[0].clone(), 1, 4, 4, (1, 1)).key()
    assert keys[0] != Packing(lambda x, n: x[0], 1, 2, 8, (1, 1)).key()


def test_newlines_that_follow_each_other():
    """As in a picture so thin that nothing but newlines is left of its canvas; against the rule, token by token."""
    pack = lambda x, newline: torch.cat((x[0, :3], newline[None], newline[None], x[0, 3:], newline[None]))  # noqa: E731
    grid = trace_packing(pack, 1, 4, 4, (1, 1))
    for i in grid.newline.nonzero().flatten().tolist():
        assert grid.row[i] == grid.row[i - 1]
        assert grid.col[i] == grid.col[i - 1] + 1
        assert grid.view[i] == grid.view[i - 1]
    assert grid.newline.nonzero().flatten().tolist() == [3, 4, 18]


def test_copies_start_empty(tiny_model):
    model = tiny_model(family="llava_next")
    prompt = tiny.prompt(model, [4, "image", 6], [(40, 24)])
    with torch.no_grad(), vlmprune.patch(model, "random", keep=3) as handle:
        want = model(**prompt).logits
        twin = copy.deepcopy(model)
        (copied,) = {id(h.plan): h.plan for h in twin.model._forward_pre_hooks.values() if hasattr(h, "plan")}.values()
        assert len(handle._plan.layouts) == 1
        assert len(copied.layouts) == 0
        assert len(pickle.loads(pickle.dumps(handle._plan.layouts))) == 0
        assert torch.equal(twin(**prompt).logits, want)
        assert len(copied.layouts) == 1


def test_threads_share_layouts():
    layouts, wrong, calls = Layouts(sizes=8, layouts=3), [], []

    def work(seed):
        generator = random.Random(seed)
        for _ in range(200):
            width = generator.randint(1, 16)
            if layouts.find(width, lambda width=width: strip(width, calls)).tokens != width:
                wrong.append(width)

    threads = [Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(layouts) <= 3
