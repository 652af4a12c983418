"""M3, Zero-TPrune and VFlowOpt: what they choose, by hand from the tower's own eager attention."""

from __future__ import annotations

from itertools import pairwise

import pytest
import reference
import tiny
import torch
from torch.nn.functional import avg_pool2d, cosine_similarity

import vlmprune
from vlmprune import UnsupportedError
from vlmprune.methods import M3, Tcc, VFlowOpt, ZeroTPrune
from vlmprune.methods.zero_tprune import without_doubles
from vlmprune.parts import ModelFacts, PageRank, outlying, recycle
from vlmprune.parts.cells import nested_cells
from vlmprune.parts.vector_taps import context_relevance, density

F64 = torch.float64
LAYER = 4  # whose output becomes the features, of 6


def tower(model, prompt):
    """Of the one view: `(heads, tokens, tokens)` attention of the feature layer, and its `(patches, dim)` keys."""
    plain = tiny.shared(dtype=F64, attn="eager").model.vision_tower
    seen = plain(prompt["pixel_values"], output_attentions=True, output_hidden_states=True)
    layer = plain.encoder.layers[LAYER]
    keys = layer.self_attn.k_proj(layer.layer_norm1(seen.hidden_states[LAYER]))
    return seen.attentions[LAYER][0], keys[0, 1:]


def ask():
    model = tiny.shared(dtype=F64)
    return model, tiny.prompt(model, [4, "image", 6], [(24, 24)])


def ranked(scores, among):
    return sorted(among, key=lambda t: -float(scores[t]))


@torch.no_grad()
@pytest.mark.parametrize(("iterations", "similar"), [(1, 0.5), (4, 0.5), (1, 0.0), (2, 1.0)])
def test_zero_tprune(iterations, similar):
    model, prompt = ask()
    attention, keys = tower(model, prompt)
    heads, tokens, _ = attention.shape
    rank = torch.ones(heads, tokens, dtype=F64)
    rank[:, 0] = tokens**0.5
    rank = rank / rank.sum(1, keepdim=True)
    for _ in range(iterations):
        rank = torch.stack([a.T @ r for a, r in zip(attention, rank, strict=True)])
    scores = (rank**2).mean(0).sqrt()[1:]
    order = ranked(scores, range(16))
    left = list(order)
    for count in (13, 11, 9, 7):  # 16 (7 / 16) ** (1, 2, 3, 4 quarters)
        upper, lower = left[: (len(left) + 1) // 2], left[(len(left) + 1) // 2 :]
        like = {t: max(float(cosine_similarity(keys[t], keys[u], 0)) for u in upper) for t in lower}
        gone = sorted(lower, key=lambda t: -like[t])[: int((len(left) - count) * similar)]
        left = [t for t in left if t not in gone][:count]
    want = sorted(left)
    with vlmprune.patch(model, ZeroTPrune(keep=7, iterations=iterations, similar=similar)) as handle:
        model(**prompt)
        assert handle.trace.kept(0) == want
        torch.testing.assert_close(handle.trace.cuts[0].scores[0], scores)
    assert want != sorted(order[:7]) or similar == 0


def test_without_doubles():
    scores = torch.tensor([[9.0, 8, 7, 3, 2, 1, 99]])
    keys = torch.tensor([[[1.0, 0], [0, 1], [1, 1], [5, 0.1], [-1, 0], [0, 3], [1, 0]]])
    among = torch.tensor([[True] * 6 + [False]])
    assert without_doubles(scores, keys, among, [2])[0].tolist() == [True, True, True, False, True, False, False]
    assert without_doubles(scores, keys, among, [9])[0].tolist() == [True] * 3 + [False] * 4
    facts = ModelFacts("llava", 24, 22, True, 32, False, 576)
    assert ZeroTPrune(keep=9).cuts(facts)[0].see[0] == PageRank(22, 1)


@torch.no_grad()
@pytest.mark.parametrize("threshold", [1.1, 30.0])
@pytest.mark.parametrize("keep", [7, 3])
def test_vflowopt(keep, threshold):
    model, prompt = ask()
    attention, _ = tower(model, prompt)
    between = attention.mean(0)[1:, 1:]
    received = between.mean(0)
    context = [j for j in range(16) if received[j] > threshold * received.mean()] or [int(received.argmax())]
    scores = between[context].sum(0)
    method = VFlowOpt(keep=keep, threshold=threshold, cell=2)
    with vlmprune.patch(model, method) as handle:
        model(**prompt)
        cuts = handle.trace.cuts
    assert [cut.layer for cut in cuts] == [0, 1, 2]
    (features,) = model.model.get_image_features(prompt["pixel_values"], return_dict=True).pooler_output
    order, count = ranked(scores, range(16)), len(cuts[0].tokens(0))
    cell = lambda t: (t // 4 // 2, t % 4 // 2)  # noqa: E731
    strong = order[: max(0, count - 4)]
    rest = [t for t in order if t not in strong]
    firsts = {}
    for t in rest:
        firsts.setdefault(cell(t), t)
    anchors = sorted(firsts.values(), key=lambda t: -float(scores[t]))[: count - len(strong)]
    kept = [*strong, *anchors]
    kept += [t for t in order if t not in kept][: count - len(kept)]
    assert cuts[0].tokens(0) == sorted(kept)
    matrix = torch.zeros(16, 16, dtype=F64)
    matrix[cuts[0].merge.into[0], torch.arange(16)] = cuts[0].merge.weight[0]
    for anchor in anchors:
        cell_mates = [t for t in rest if cell(t) == cell(anchor) and (t == anchor or t not in kept)]
        weight = scores[cell_mates] / scores[cell_mates].sum()
        torch.testing.assert_close(matrix[anchor] @ features, weight @ features[cell_mates])
    for one in strong:
        assert matrix[one].tolist() == [float(t == one) for t in range(16)]
    # the same scores cut again
    left = cuts[0].tokens(0)
    for cut in cuts[1:]:
        left = sorted(ranked(scores, left)[: len(cut.tokens(0))])
        assert cut.tokens(0) == left
    assert len(left) == keep


def test_context_where_nothing_stands_out():
    query = torch.zeros(1, 2, 3, 4)
    got = context_relevance(query, query, 1.0, 5.0, 0)
    torch.testing.assert_close(got, torch.full((1, 3), 1 / 3))


def test_recycling_fills_up_and_gives_up():
    scores = torch.tensor([[6.0, 5, 4, 3, 2, 1]])
    cell, patches = torch.tensor([[0, 0, 0, 1, 1, 1]]), torch.ones(1, 6, dtype=torch.bool)
    keep, merge = recycle(scores, cell, patches, [4], [2])
    assert keep[0].nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert merge.into[0].tolist() == [0, 1, 2, 3, 3, 3]
    torch.testing.assert_close(merge.weight, torch.tensor([[1, 1, 1, 3 / 6, 2 / 6, 1 / 6]]))
    # one cell has nothing left to recycle: the next best takes its place, and is no longer part of a mean
    keep, merge = recycle(scores, cell, patches, [5], [2])
    assert keep[0].tolist() == [True] * 5 + [False]
    torch.testing.assert_close(merge.weight, torch.tensor([[1, 1, 1, 3 / 4, 1, 1 / 4]]))
    # more cells than the budget pays for
    keep, merge = recycle(scores, cell, patches, [1], [2])
    assert keep[0].nonzero().flatten().tolist() == [0]
    torch.testing.assert_close(merge.weight[0, :3], scores[0, :3] / 15)
    keep, _ = recycle(scores, cell, patches, [3], [0])
    assert keep[0].tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize(("average", "index"), [(0.25, 0), (0.5, 1), (0.1, 2), (144, 0)])
def test_vflowopt_has_the_released_schedules(average, index):
    """They are named by their mean over the layers of a 28-layer decoder."""
    facts = ModelFacts("llava_onevision", 26, 25, False, 28, True, 576)
    cuts = VFlowOpt(average=average).cuts(facts)
    assert [cut.at.layer for cut in cuts] == [0, 9, 18]
    schedule = cuts[0].reduce.keywords["schedule"]
    counts = [schedule.left(10**6, stage) for stage in range(3)] if average != 144 else [1]
    if average != 144:
        mean = sum(n * (b - a) for n, (a, b) in zip(counts, pairwise([0, 9, 18, 28]), strict=True)) / 28
        assert mean == pytest.approx(average * 10**6, abs=4)
    plain = VFlowOpt().schedules([0, 9, 18], 28)[index]
    released = 1 - sum(s * (1 - r) for s, r in zip(plain.shares, plain.ratios, strict=True))
    assert released == pytest.approx({0: 0.25, 1: 0.5, 2: 0.1}[index], abs=0.012)
    assert schedule.ratios == plain.ratios
    assert [cut.at.layer for cut in VFlowOpt().cuts(ModelFacts("llava", 24, 22, True, 32, False, 576))] == [0, 10, 20]
    with pytest.raises(ValueError, match="weight 0"):
        vlmprune.patch(tiny.shared(), "vflowopt", alpha=0.5)


@pytest.mark.parametrize(("budget", "second", "third"), [({"average": 0.25}, 0.8, 0.3), ({"keep": 0.1}, 0.5, None)])
def test_vflowopt_with_cuts_of_ones_own(budget, second, third):
    """The later cuts leave what was said, and the first what the budget needs."""
    facts = ModelFacts("llava", 24, 22, True, 30, False, 576)
    schedule = VFlowOpt(**budget, second=second, third=third).cuts(facts)[0].reduce.keywords["schedule"]
    first, middle, last = (schedule.left(10**6, stage) for stage in range(3))
    assert middle / first == pytest.approx(second, abs=1e-5)
    assert last / middle == pytest.approx(
        0.8773 if third is None and "average" in budget else third or 0.6011, abs=1e-5
    )
    got = last if "keep" in budget else (first + middle + last) / 3
    assert got == pytest.approx(10**6 * next(iter(budget.values())), abs=2)
    assert VFlowOpt(keep=1.0, second=0.5).cuts(facts)[0].reduce.keywords["schedule"].left(99, 2) == 99


def test_vflowopt_cuts_that_no_budget_meets():
    facts = ModelFacts("llava", 24, 22, True, 30, False, 576)
    with pytest.raises(
        ValueError, match=r"keep=0\.5 cannot be met with these cuts: the first would have to leave 2\.5"
    ):
        VFlowOpt(keep=0.5, second=0.5, third=0.4).cuts(facts)
    with pytest.raises(ValueError, match=r"average=0\.9 cannot be met"):
        VFlowOpt(average=0.9, second=0.5, third=0.4).cuts(facts)
    with pytest.raises(ValueError, match="second=0"):
        VFlowOpt(keep=0.5, second=0)


@torch.no_grad()
def test_m3_is_average_pooling():
    model, prompt = ask()
    (features,) = model.model.get_image_features(prompt["pixel_values"], return_dict=True).pooler_output
    for keep, side in ((16, 1), (15, 2), (4, 2), (3, 4), (1, 4)):
        with vlmprune.patch(model, M3(keep=keep)) as handle:
            model(**prompt)
            (cut,) = handle.trace.cuts
        pooled = avg_pool2d(features.T.unflatten(1, (4, 4)), side).flatten(1).T
        if side == 1:
            assert len(handle.trace.kept(0)) == 16
            continue
        made = torch.zeros_like(features).index_add(0, cut.merge.into[0], features * cut.merge.weight[0, :, None])
        torch.testing.assert_close(made[cut.tokens(0)], pooled)
    both = [vlmprune.registry.find("random")(keep=8), M3(keep=4)]
    with vlmprune.patch(model, both), pytest.raises(UnsupportedError, match="put m3 first"):
        model(**prompt)


def test_outliers_and_density():
    row = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8, 30]])
    assert (outlying(row) > 0)[0].tolist() == [False] * 8 + [True]  # Q3 7, Q1 3: above 13
    keys = torch.tensor([[[1.0, 0], [1, 0.01], [1, 0.02], [0, 1]]])
    assert float(density(keys, 0.9, 0)) == 0.25
    assert float(density(keys, 0.9, 2)) == 1
    assert float(density(keys, 0.9, 1)) == 0.25


@torch.no_grad()
def test_tcc():
    model, prompt = ask()
    attention, keys = tower(model, prompt)
    plain = tiny.shared(dtype=F64, attn="eager").model.vision_tower
    seen = plain(prompt["pixel_values"], output_attentions=True, output_hidden_states=True)
    # layers 3 and 22 of 24 are 1 and 4 of 6, the last of them at most
    layer = plain.encoder.layers[1]
    shallow, deep = seen.attentions[1][0].mean(0)[0, 1:], attention.mean(0)[0, 1:]
    keys = layer.self_attn.k_proj(layer.layer_norm1(seen.hidden_states[1]))[0, 1:]
    for options in ({}, {"alike": 0.2, "doubles": 1}, {"keep": 5}, {"seed": 3, "keep": 5}):
        method = Tcc(**options)
        cos = cosine_similarity(keys[:, None], keys[None], dim=-1)
        single = sum(int((cos[i] > method.alike).sum()) - 1 <= method.doubles for i in range(16))
        strong = [t for t in range(16) if outlying(deep[None])[0, t] > 0]
        with vlmprune.patch(model, method) as handle:
            model(**prompt)
            (cut,) = handle.trace.cuts
        draw = torch.rand(16, generator=torch.Generator().manual_seed(method.seed * 1_000_003))
        order = ranked(shallow.log() - (-draw.log()).log(), range(16))
        if "keep" in options:
            want = (sorted(strong, key=order.index) + [t for t in order if t not in strong])[:5]
        else:
            want = {*strong, *order[: max(1, single)]}
        assert cut.tokens(0) == sorted(want)
        for t in set(range(16)) - set(want):
            assert cut.merge.into[0, t] == max(sorted(want), key=lambda k: float(cos[t, k]))
        if len(want) < 16:
            total = torch.zeros(16, dtype=F64).index_add(0, cut.merge.into[0], cut.merge.weight[0].double())
            torch.testing.assert_close(total[sorted(want)], torch.ones(len(want), dtype=F64))


@torch.no_grad()
@pytest.mark.parametrize("keep", [20, 30, 10])
def test_lrs(keep):
    model = tiny.shared(dtype=F64, family="llava_next")
    prompt = tiny.prompt(model, [4, "image", 6], [(48, 48)])
    x, (image,) = reference.embed(model, prompt)
    weights = reference.probabilities(model, 0, x, torch.arange(len(x))).mean(0)[-1][list(image)]
    with vlmprune.patch(model, "lrs", keep=keep, coarse=0.13) as handle:
        model(**prompt)
        (grid,), got = handle.trace.grids, handle.trace.kept_patches()
        assert handle.trace.cuts[0].layer == 1
    assert grid.crops == (2, 2)
    small = ranked(weights, range(16))
    tiles = {1 + (t // 4 // 2) * 2 + t % 4 // 2 for t in small[:2]}
    crops = [t for t in range(16, grid.tokens) if not grid.newline[t]]
    chosen = ranked(weights, [t for t in crops if int(grid.view[t]) in tiles])
    others = ranked(weights, [t for t in crops if int(grid.view[t]) not in tiles])
    assert got == sorted([*small, *chosen, *others][:keep])
    assert tiles != {1, 2, 3, 4}


def test_m3_has_the_published_scales(tiny_grid):
    """576, 144, 36, 9 and 1 of 24 x 24; by the prime factors of the side for others."""
    for side, scales in ((24, [576, 144, 36, 9, 1]), (27, [729, 81, 9, 1]), (7, [49, 1])):
        grid = tiny_grid(side)
        found = {nested_cells(grid, keep)[2] for keep in range(1, side * side + 1)}
        assert sorted(found, reverse=True) == scales


@pytest.fixture
def tiny_grid():
    from vlmprune.parts.tracing import trace_packing

    return lambda side: trace_packing(lambda x, newline: x.flatten(0, 1), 1, side, side, (1, 1))
