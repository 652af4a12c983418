"""Top-k with its tie rule, newline policies, shares of views, by hand."""

from __future__ import annotations

from dataclasses import replace

import probes
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from probes import anyres, hand_layout, kept, raster

from vlmprune.parts.selection import keep_patches, select, top_k

fast = settings(max_examples=200, deadline=None, derandomize=True)
few = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 0.5000001, 1.0])  # many ties
special = few | st.sampled_from([float("inf"), float("-inf")])
ROWS = st.integers(1, 12).flatmap(
    lambda n: st.tuples(st.lists(st.tuples(special, st.booleans()), min_size=n, max_size=n), st.integers(0, n + 2))
)


@fast
@given(row=ROWS)
def test_top_k_is_the_sorted_best_with_ties_to_the_lower_index(row):
    items, count = row
    scores, candidates = torch.tensor([s for s, _ in items]), torch.tensor([c for _, c in items])
    got = top_k(scores[None], [count], candidates[None])[0].nonzero().flatten().tolist()
    allowed = [i for i, (_, c) in enumerate(items) if c]
    assert got == reference.top([s for s, _ in items], count, allowed)
    assert len(got) == min(count, len(allowed))


@fast
@given(data=st.data(), batch=st.integers(1, 4), tokens=st.integers(1, 9))
def test_top_k_rows_do_not_touch_each_other(data, batch, tokens):
    scores = torch.tensor([[data.draw(few) for _ in range(tokens)] for _ in range(batch)])
    allowed = torch.tensor([[data.draw(st.booleans()) for _ in range(tokens)] for _ in range(batch)])
    counts = [data.draw(st.integers(0, tokens)) for _ in range(batch)]
    together = top_k(scores, counts, allowed)
    for i in range(batch):
        assert torch.equal(together[i], top_k(scores[i : i + 1], counts[i : i + 1], allowed[i : i + 1])[0])
    nested = top_k(scores[None].expand(2, -1, -1), torch.tensor([counts, counts]), allowed[None].expand(2, -1, -1))
    assert torch.equal(nested[1], together)


def test_top_k_survives_nan():
    scores = torch.tensor([[1.0, float("nan"), 3.0, 2.0]])
    assert top_k(scores, [2], torch.ones(1, 4, dtype=torch.bool)).sum() == 2
    only = torch.tensor([[True, False, True, True]])
    assert top_k(scores, [2], only)[0].tolist() == [False, False, True, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_top_k_in_every_dtype(dtype):
    scores = torch.tensor([[0.0, 1.0, 1.0, 1.0, -5.0]], dtype=dtype)
    assert top_k(scores, [2], torch.ones(1, 5, dtype=torch.bool))[0].tolist() == [False, True, True, False, False]


# Newlines. A 40 x 24 picture: thumbnail 4 x 4, then a canvas whose rows end in newlines.

GRID = anyres(40, 24)


def rows_of(grid):
    """(canvas tokens, newline) of every canvas row, read off the flags alone."""
    rows, current = [], []
    for t in range(16, grid.tokens):
        if grid.newline[t]:
            rows.append((current, t))
            current = []
        else:
            current.append(t)
    assert not current
    return rows


def test_the_grid_these_tests_think_of():
    assert GRID.views > 1
    assert not GRID.newline[:16].any()
    assert len(rows_of(GRID)) == GRID.newlines == GRID.planes[1][0] > 4


@pytest.mark.parametrize("policy", ["all", "row", "none"])
def test_newline_policies(policy):
    layout, rows = hand_layout(GRID, GRID), rows_of(GRID)
    keep = torch.zeros(2, GRID.tokens, dtype=torch.bool)
    keep[0, [3, 15, rows[1][0][0], rows[1][0][-1], rows[4][0][2]]] = True
    keep[1, rows[-1][0]] = True
    reduction = keep_patches(keep, layout, [5, len(rows[-1][0])], policy)
    lines = {
        "all": [[line for _, line in rows]] * 2,
        "row": [[rows[1][1], rows[4][1]], [rows[-1][1]]],
        "none": [[], []],
    }[policy]
    for i in range(2):
        assert kept(reduction, i) == sorted(keep[i].nonzero().flatten().tolist() + lines[i])
    if reduction.counts is not None:
        assert reduction.counts == reduction.keep.sum(1).tolist()
    assert (reduction.counts is None) == (policy == "row")
    assert reduction.patches == [5, len(rows[-1][0])]


def test_a_thumbnail_row_keeps_no_newline_of_the_canvas():
    layout = hand_layout(GRID)
    keep = torch.zeros(1, GRID.tokens, dtype=torch.bool)
    keep[0, :16] = True
    assert kept(keep_patches(keep, layout, [16], "row")) == list(range(16))


def test_newlines_as_candidates_compete():
    layout = hand_layout(GRID)
    scores = torch.linspace(1, 0, GRID.tokens)[None].clone()
    line = rows_of(GRID)[-1][1]
    scores[0, line] = 2
    assert kept(select(scores, 4, layout, "candidates")) == [0, 1, 2, line]
    assert kept(select(scores, 1.0, layout, "candidates")) == list(range(GRID.tokens))
    # of a fraction, all tokens are the base
    assert len(kept(select(scores, 0.5, layout, "candidates"))) == GRID.tokens // 2
    # and elsewhere they never win, whatever their score
    assert line not in kept(select(scores, 4, layout, "none"))
    assert kept(select(scores, 4, layout, "none")) == [0, 1, 2, 3]


@pytest.mark.parametrize("scope", ["image", "view"])
@pytest.mark.parametrize("keep", [1, 5, 17, 0.01, 0.3, 0.77, 10_000, 1.0])
def test_scopes_by_hand(scope, keep):
    grids = [anyres(40, 24), anyres(20, 70), anyres(24, 24)]
    layout = hand_layout(*grids)
    scores = torch.rand(3, layout.width, generator=torch.Generator().manual_seed(1))
    reduction = select(scores, keep, layout, "none", scope)
    for i, grid in enumerate(grids):
        patches = [t for t in range(grid.tokens) if not grid.newline[t]]
        views = [[t for t in patches if grid.view[t] == v] for v in range(grid.views)]
        want = []
        if scope == "image":
            n = min(keep, len(patches)) if isinstance(keep, int) else max(1, int(len(patches) * keep))
            want = reference.top(scores[i].tolist(), n, patches)
        else:
            if isinstance(keep, int):
                exact = [min(keep, len(patches)) * len(v) / len(patches) for v in views]
                parts = [int(e) for e in exact]
                order = sorted(range(len(views)), key=lambda v: (parts[v] - exact[v], v))
                for v in order[: min(keep, len(patches)) - sum(parts)]:
                    parts[v] += 1
            else:
                parts = [max(1, int(len(v) * keep)) if v else 0 for v in views]
            for part, view in zip(parts, views, strict=True):
                want += reference.top(scores[i].tolist(), part, view)
        assert kept(reduction, i) == sorted(want)
    assert reduction.counts == reduction.keep.sum(1).tolist()


@pytest.mark.parametrize("newlines", ["all", "row", "none", "candidates"])
@pytest.mark.parametrize("scope", ["image", "view"])
def test_known_counts_are_right_after_an_earlier_cut(newlines, scope):
    """A wrong promised count corrupts the sequence silently: counts must be right or left open."""
    layout = hand_layout(anyres(40, 24), anyres(20, 70))
    generator = torch.Generator().manual_seed(2)
    alive = layout.alive & (torch.rand(layout.alive.shape, generator=generator) < 0.5)
    patches = (alive & ~layout.newline).sum(1).tolist()
    for known in (patches, None):
        later = replace(layout, alive=alive, alive_counts=alive.sum(1).tolist(), alive_patches=known,
                        entered=alive.sum(1).tolist(), entered_patches=known)  # fmt: skip
        for keep in (3, 0.4, 1.0, 500):
            scores = torch.rand(alive.shape, generator=generator)
            reduction = select(scores, keep, later, newlines, scope)
            assert not (reduction.keep & ~alive).any()
            if reduction.counts is not None:
                assert reduction.counts == reduction.keep.sum(1).tolist(), keep
            if reduction.patches is not None:
                assert reduction.patches == (reduction.keep & ~layout.newline).sum(1).tolist(), keep


def test_padding_is_never_chosen():
    layout = hand_layout(raster(2, 2), raster(4, 4))
    scores = torch.zeros(2, 16)
    scores[0, 4:] = 9
    assert kept(select(scores, 3, layout)) == [0, 1, 2]
    assert probes.kept(select(scores, 16, layout)) == [0, 1, 2, 3]
