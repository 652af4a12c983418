"""Every method's choice in a model equals one made by hand from that model's own eager attentions."""

from __future__ import annotations

import math

import probes
import pytest
import reference
import tiny
import torch
from scenes import CROPS, STILL

import vlmprune
from vlmprune import UnsupportedError

F64 = torch.float64
FAMILIES = {
    "llava": {},
    "llava_next": {"family": "llava_next"},
    "next-siglip": {"family": "llava_next", "tower": "siglip"},
}
SIZES = [(40, 24), (20, 70)]


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def case(request, tiny_model):
    """(model, prompt, per image: grid, tower attentions of its views, decoder attentions over its tokens)."""
    model, plain = tiny_model(dtype=F64, **request.param), tiny.shared(dtype=F64, attn="eager", **request.param)
    prompt = tiny.prompt(model, [4, "image", 3, "image", 5], SIZES)
    with torch.no_grad():
        with vlmprune.patch(model, "random", keep=1.0) as handle:
            model(**prompt)
            grids = handle.trace.grids
        decoder = plain(**prompt, output_attentions=True).attentions
        images = []
        for image, grid in zip(prompt["pixel_values"], grids, strict=True):
            views = image[None] if image.ndim == 3 else image[: grid.views]
            images.append((grid, plain.model.vision_tower(views, output_attentions=True).attentions))
    return model, prompt, images, [a[0] for a in decoder]


def kept_by(model, prompt, method, **options):
    with torch.no_grad(), vlmprune.patch(model, method, **options) as handle:
        model(**prompt)
        return [handle.trace.kept(i) for i in range(2)], handle.trace


def to_tokens(grid, values):
    """Scores `(views, patches)` per token, None at newlines."""
    flat = values.flatten().tolist()
    return [None if grid.newline[t] else flat[grid.source[t]] for t in range(grid.tokens)]


def choose(grid, scores, keep, scope):
    patches = [t for t in range(grid.tokens) if not grid.newline[t]]
    views = [patches] if scope == "image" else [[t for t in patches if grid.view[t] == v] for v in range(grid.views)]
    if isinstance(keep, float):
        parts = [max(1, math.floor(len(v) * keep)) if v else 0 for v in views]
    else:
        exact = [min(keep, len(patches)) * len(v) / len(patches) for v in views]
        parts = [int(e) for e in exact]
        for v in sorted(range(len(views)), key=lambda v: (parts[v] - exact[v], v))[
            : min(keep, len(patches)) - sum(parts)
        ]:
            parts[v] += 1
    kept = [t for part, view in zip(parts, views, strict=True) for t in reference.top(
        [s if s is not None else 0 for s in scores], part, view)]  # fmt: skip
    return sorted(kept + [t for t in range(grid.tokens) if grid.newline[t]])


@pytest.mark.parametrize("scope", ["view", "image"])
@pytest.mark.parametrize("keep", [7, 0.3])
def test_fopru(case, keep, scope):
    model, prompt, images, _ = case
    first = int(model.config.vision_config.model_type == "clip_vision_model")
    got, trace = kept_by(model, prompt, "fopru", keep=keep, scope=scope)
    want, twin = [], []
    for grid, attentions in images:
        mean = attentions[4].mean(1)[:, first:, first:]
        want.append(choose(grid, to_tokens(grid, mean.mean(1)), keep, scope))
        twin.append(choose(grid, to_tokens(grid, mean.mean(2) - mean[:, 0]), keep, scope))
    assert got == want != twin
    for i, (grid, attentions) in enumerate(images):
        scores = to_tokens(grid, attentions[4].mean(1)[:, first:, first:].mean(1))
        for t, score in enumerate(scores):
            if score is not None:
                assert abs(trace.cuts[0].scores[i, t] - score) < 1e-6


def test_fopru_by_cls_and_layer(case):
    model, prompt, images, _ = case
    if model.config.vision_config.model_type != "clip_vision_model":
        with pytest.raises(UnsupportedError, match="received"):
            vlmprune.patch(model, "fopru", keep=3, score="cls")
        return
    for layer, index in ((None, 4), (2, 2), (-1, 5)):
        got, _ = kept_by(model, prompt, "fopru", keep=9, score="cls", layer=layer)
        assert got == [choose(g, to_tokens(g, a[index].mean(1)[:, 0, 1:]), 9, "view") for g, a in images]


COMBINE = {
    "sum": lambda x: x.sum(0),
    "mean": lambda x: x.mean(0),
    "max": lambda x: x.amax(0),
    "min": lambda x: x.amin(0),
}


@pytest.mark.parametrize("ensemble", COMBINE)
@pytest.mark.parametrize("layer", [(1, 4), (0, -2, 3)], ids=str)
def test_fopru_over_several_layers(case, ensemble, layer):
    model, prompt, images, _ = case
    first = int(model.config.vision_config.model_type == "clip_vision_model")
    got, _ = kept_by(model, prompt, "fopru", keep=9, layer=layer, ensemble=ensemble)
    rows = [[a[i].mean(1)[:, first:, first:].mean(1) for i in layer] for _, a in images]
    want, *twins = (
        [
            choose(grid, to_tokens(grid, COMBINE[how](torch.stack(mine))), 9, "view")
            for (grid, _), mine in zip(images, rows, strict=True)
        ]
        for how in (ensemble, "max" if ensemble != "max" else "min")
    )
    assert got == want
    assert got not in twins
    alone, _ = kept_by(model, prompt, "fopru", keep=9, layer=layer[0])
    assert got != alone
    assert got == kept_by(model, prompt, "fopru", keep=9, layer=list(layer), ensemble=ensemble)[0]


@pytest.mark.parametrize("strategy", ["rank", "row"])
def test_fopru_with_a_budget_above_what_is_there_keeps_all(case, strategy):
    model, prompt, images, _ = case
    got, _ = kept_by(model, prompt, "fopru", keep=100_000, strategy=strategy)
    assert got == [list(range(grid.tokens)) for grid, _ in images]


@pytest.mark.parametrize("newlines", ["all", "row", "none"])
@pytest.mark.parametrize("keep", [9, 0.4])
def test_fopru_rows(case, keep, newlines):
    model, prompt, images, _ = case
    first = int(model.config.vision_config.model_type == "clip_vision_model")
    got, _ = kept_by(model, prompt, "fopru", keep=keep, strategy="row", newlines=newlines)
    for (grid, attentions), mine in zip(images, got, strict=True):
        scores = to_tokens(grid, attentions[4].mean(1)[:, first:, first:].mean(1))
        planes = [[t for t in range(grid.tokens) if not grid.newline[t] and (grid.view[t] > 0) == p] for p in (0, 1)]
        planes = [p for p in planes if p]
        want = set()
        budget = None
        if isinstance(keep, int):
            total = sum(map(len, planes))
            exact = [keep * len(p) / total for p in planes]
            budget = [int(e) for e in exact]
            order = sorted(range(len(planes)), key=lambda v: (budget[v] - exact[v], v))
            for v in order[: keep - sum(budget)]:
                budget[v] += 1
        for number, plane in enumerate(planes):
            rows = {}
            for t in plane:
                rows.setdefault(int(grid.row[t]), []).append(t)
            means = [sum(scores[t] for t in rows[r]) / len(rows[r]) for r in sorted(rows)]
            n = max(1, int(len(rows) * keep)) if budget is None else budget[number] // len(rows[0])
            for r in reference.top(means, n, list(range(len(means)))):
                want |= set(rows[r])
        patches = {t for t in mine if not grid.newline[t]}
        if want:
            assert patches == want
        else:  # a budget below one row pays for one row all the same
            assert len(patches) == len([t for t in planes[0] if grid.row[t] == 0])
        lines = [t for t in range(grid.tokens) if grid.newline[t]]
        if newlines == "row":
            lines = [t for t in lines if any(grid.view[u] > 0 and grid.row[u] == grid.row[t] for u in want)]
        assert sorted(set(mine) - patches) == ([] if newlines == "none" else lines)


@pytest.mark.parametrize("ensemble", ["sum", "mean", "max", "min"])
def test_vtc_cls(case, ensemble):
    model, prompt, images, _ = case
    if model.config.vision_config.model_type != "clip_vision_model":
        with pytest.raises(UnsupportedError, match="fallback"):
            vlmprune.patch(model, "vtc_cls", keep=3)
        got, _ = kept_by(model, prompt, "vtc_cls", keep=9, start_layer=2, ensemble=ensemble, fallback="received")
        picture = [[a[i].mean(1).mean(1) for i in (2, 3, 4)] for _, a in images]
    else:
        got, _ = kept_by(model, prompt, "vtc_cls", keep=9, start_layer=2, ensemble=ensemble)
        picture = [[a[i].mean(1)[:, 0, 1:] for i in (2, 3, 4)] for _, a in images]
    want = [
        choose(grid, to_tokens(grid, COMBINE[ensemble](torch.stack(rows))), 9, "view")
        for (grid, _), rows in zip(images, picture, strict=True)
    ]
    assert got == want
    twin = [choose(grid, to_tokens(grid, rows[0]), 9, "view") for (grid, _), rows in zip(images, picture, strict=True)]
    assert got != twin


def test_vtc_cls_default_layers(case):
    """16 of 24 layers, scaled to 6: from layer 4 to the last but one."""
    model, prompt, images, _ = case
    if model.config.vision_config.model_type == "clip_vision_model":
        got, _ = kept_by(model, prompt, "vtc_cls", keep=9)
        assert got == [choose(g, to_tokens(g, a[4].mean(1)[:, 0, 1:]), 9, "view") for g, a in images]


@pytest.mark.parametrize("rows", ["last", "all"])
@pytest.mark.parametrize("newlines", ["candidates", "all", "none"])
@pytest.mark.parametrize(("keep", "layer"), [(9, 2), (0.5, 1), (0.3, 3)])
def test_fastv(case, rows, newlines, keep, layer):
    model, prompt, images, decoder = case
    got, trace = kept_by(model, prompt, "fastv", keep=keep, layer=layer, rows=rows, newlines=newlines)
    mean = decoder[layer - 1].mean(0)
    row = mean[-1] if rows == "last" else mean.mean(0)
    columns = (prompt["input_ids"][0] == tiny.IMAGE).nonzero().flatten().tolist()
    start = 0
    for (grid, _), mine in zip(images, got, strict=True):
        scores = row[columns[start : start + grid.tokens]].tolist()
        lines = [t for t in range(grid.tokens) if grid.newline[t]]
        among = [t for t in range(grid.tokens) if newlines == "candidates" or t not in lines]
        n = min(keep, len(among)) if isinstance(keep, int) else max(1, int(len(among) * keep))
        want = reference.top(scores, n, among)
        assert mine == sorted(want + (lines if newlines == "all" else []))
        start += grid.tokens
    assert trace.kv_lengths[:layer] == [prompt["input_ids"].shape[1]] * layer
    assert trace.cuts[0].positions == "original"


# Controls


@pytest.mark.parametrize("keep", [1, 5, 9, 0.1, 0.5])
@pytest.mark.parametrize("newlines", ["all", "none"])
def test_pool_is_the_mean_of_rectangles(tiny_model, keep, newlines):
    """X' by hand from what the trace says was kept: every kept patch stands for the mean of its cell."""
    for family in ("llava", "llava_next"):
        model = tiny_model(family=family, dtype=F64)
        prompt = tiny.prompt(model, [4, "image", 3], SIZES[:1])
        with torch.no_grad():
            (features,) = reference.image_features(model, prompt)
            with vlmprune.patch(model, "pool", keep=keep, newlines=newlines) as handle:
                out = model(**prompt, output_hidden_states=True)
        (grid,), kept = handle.trace.grids, handle.trace.kept()
        entered = out.hidden_states[0][0, 4 : 4 + grid.tokens]
        patches = [t for t in kept if not grid.newline[t]]
        for plane in (0, 1):
            mine = [t for t in range(grid.tokens) if not grid.newline[t] and (grid.view[t] > 0) == plane]
            anchors = [t for t in patches if t in mine]
            if not anchors:
                continue
            # the cells by hand: a regular grid of as many rows and columns as the anchors span
            r, c = len({int(grid.row[t]) for t in anchors}), len({int(grid.col[t]) for t in anchors})
            assert r * c == len(anchors)
            rows, cols = (int(x[mine].max()) + 1 for x in (grid.row, grid.col))
            cells = {}
            for t in mine:
                cells.setdefault((int(grid.row[t]) * r // rows, int(grid.col[t]) * c // cols), []).append(t)
            for anchor in anchors:
                (cell,) = [cell for cell in cells.values() if anchor in cell]
                assert len([a for a in anchors if a in cell]) == 1
                probes.same(entered[anchor], features[cell].mean(0))
        for t in kept:
            if grid.newline[t]:
                probes.same(entered[t], features[t])
        total = sum(not n for n in grid.newline.tolist())
        assert 1 <= len(patches) <= (keep if isinstance(keep, int) else max(2, total * keep))
        assert bool([t for t in kept if grid.newline[t]]) == (newlines == "all" and family == "llava_next")


@pytest.mark.parametrize("size", [(24, 24), (40, 24), (24, 70), (72, 24), (9, 200), (200, 9)])
def test_grid_and_pool_keep_the_same_regular_places(tiny_model, size):
    model = tiny_model(family="llava_next")
    prompt = tiny.prompt(model, [4, "image", 3], [size])
    for keep in (1, 4, 10, 0.25, 0.9):
        grid, trace = kept_one(model, prompt, "grid", keep)
        pool, _ = kept_one(model, prompt, "pool", keep)
        assert grid == pool
        patches = [t for t in grid if not trace.grids[0].newline[t]]
        total = trace.grids[0].patches
        assert 1 <= len(patches) <= (keep if isinstance(keep, int) else max(2, total * keep))


def kept_one(model, prompt, method, keep):
    with torch.no_grad(), vlmprune.patch(model, method, keep=keep) as handle:
        model(**prompt)
    return handle.trace.kept(), handle.trace


def test_random_depends_on_its_seed_alone(tiny_model):
    model = tiny_model()
    one, two = (tiny.prompt(model, [4, "image", 3], [(24, 24)], seed) for seed in (0, 1))
    picks = [kept_seed(model, p, s) for s in (0, 0, 1, 2) for p in (one, two)]
    assert picks[0] == picks[1] == picks[2] == picks[3]
    assert len({tuple(p) for p in picks}) == 3
    state = torch.get_rng_state()
    kept_seed(model, one, 7)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is the user's"


def kept_seed(model, prompt, seed):
    with torch.no_grad(), vlmprune.patch(model, "random", keep=5, seed=seed) as handle:
        model(**prompt)
    return handle.trace.kept()


def test_random_is_uniform():
    counts = torch.zeros(16)
    layout = probes.hand_layout(probes.raster(4, 4))
    for seed in range(400):
        reduction = vlmprune.registry.find("random")(keep=4, seed=seed).reduce({}, layout)
        assert reduction.keep.sum() == 4
        counts += reduction.keep[0]
    assert 60 < counts.min() <= counts.max() < 145  # mean 100, deviation 8.7


# All methods


SINGLE_VIEW = "llava models have a single view"
UNEQUAL_VIEWS = "treats all views alike, and images differ in their views: give a fraction as keep"


def refused(words, call):
    """Check that `call` is refused in these words, and skip the test for all to see."""
    with pytest.raises(UnsupportedError, match=words):
        call()
    pytest.skip(f"refused, as it should be: {words}")


@pytest.mark.parametrize("name", STILL)
@pytest.mark.parametrize("size", [(1, 90), (90, 1), (2, 3), (400, 30)])
def test_odd_pictures(tiny_model, name, size):
    """So thin that nothing of the canvas is left, or its newlines alone."""
    model = tiny_model(family="llava_next", dtype=F64)
    prompt = tiny.prompt(model, [3, "image", 4], [size])
    options = {"keep": 0.3} if name != "atp" else {"thresholds": tiny.modules(model)}
    options |= vlmprune.registry.find(name).plain_with
    with torch.no_grad(), vlmprune.patch(model, name, **options) as handle:
        out = model(**prompt)
        assert torch.isfinite(out.logits).all()
        assert handle.trace.counts[0]["patches_after"] >= 1
        batch = tiny.batch([prompt, tiny.prompt(model, [2, "image"], [(24, 24)])])
        probes.same(model(**probes.step_inputs(batch)).logits[0, -1], out.logits[0, -1])


@pytest.mark.parametrize("keep", [1.0, 10_000])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("name", [n for n in STILL if "keep" in vlmprune.registry.options(vlmprune.registry.find(n))])
def test_a_budget_of_all_tokens_is_the_identity_bitwise(tiny_model, name, family, keep):
    model = tiny_model(family=family)
    prompt, forced = tiny.prompt(model, [4, "image", 3, "image", 5], SIZES), probes.random_tokens(1, 3)
    plain = probes.forced_logits(model, prompt, forced)
    if name in CROPS and family == "llava":
        refused(SINGLE_VIEW, lambda: vlmprune.patch(model, name, keep=keep))
    if name in ("flowcut", "pitome", "tome") and family == "llava_next" and isinstance(keep, int):
        refused(UNEQUAL_VIEWS, lambda: vlmprune.patch(model, name, keep=keep))
    with vlmprune.patch(model, name, keep=keep, **vlmprune.registry.find(name).plain_with) as handle:
        pruned = probes.forced_logits(model, prompt, forced)
        assert torch.equal(pruned, plain)
        assert handle.trace.kv_lengths == [prompt["input_ids"].shape[1]] * tiny.LAYERS


def test_pool_comes_first(tiny_model):
    model = tiny_model()
    prompt = tiny.prompt(model, [4, "image", 3], [(24, 24)])
    methods = [vlmprune.registry.find("random")(keep=8), vlmprune.registry.find("pool")(keep=4)]
    with vlmprune.patch(model, methods), pytest.raises(UnsupportedError, match="put pool first"):
        model(**prompt)
    with vlmprune.patch(model, methods[::-1]) as handle, torch.no_grad():
        model(**prompt)
        assert len(handle.trace.kept()) == 4
