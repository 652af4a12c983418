"""What a value of an option means: choices computed by hand, on inputs where another value chooses otherwise."""

from __future__ import annotations

import probes
import pytest
import reference
import tiny
import torch
from torch.nn.functional import interpolate, normalize

import vlmprune
from vlmprune.methods import FastV

F64 = torch.float64
NEWLINES = [
    "fopru",
    "vtc_cls",
    "globalcom2",
    "todre",
    "transprune",
    "fastv",
    "tome",
    "pitome",
    "random",
    "grid",
    "pool",
]
MORE = {"todre": {"tau": None}, "transprune": {"keep_ratios": (0.6, 0.4, 0.3)}}


def kept_of(model, prompt, method, cut=-1, **options):
    """Kept tokens of every image, the trace, and the last token's logits."""
    with torch.no_grad(), vlmprune.patch(model, method, **options) as handle:
        logits = model(**probes.step_inputs(prompt)).logits[0, -1]
        trace = handle.trace
    return [trace.kept(i, cut) for i in range(len(trace.grids))], trace, logits


@pytest.mark.parametrize("name", NEWLINES)
def test_newlines(name):
    """Kept always, kept with a patch of their row, dropped; the patches are chosen alike (before later cuts differ)."""
    model = tiny.shared(dtype=F64, family="llava_next")
    prompt = tiny.prompt(model, [4, "image", 6], [(70, 24)])
    options = {"keep": 0.5 if name in ("tome", "pitome") else 0.15} | MORE.get(name, {})
    if name == "transprune":
        del options["keep"]
    patches, lines = {}, {}
    for rule in ("all", "row", "none"):
        (kept,), trace, _ = kept_of(model, prompt, name, cut=0, newlines=rule, **options)
        (grid,) = trace.grids
        patches[rule] = [t for t in kept if not grid.newline[t]]
        lines[rule] = [t for t in kept if grid.newline[t]]
    rows = {int(grid.row[t]) for t in patches["row"] if grid.view[t]}
    every = [t for t in range(grid.tokens) if grid.newline[t]]
    assert patches["all"] == patches["row"] == patches["none"]
    assert lines["all"] == every
    assert lines["row"] == [t for t in every if int(grid.row[t]) in rows]
    assert lines["none"] == []
    assert lines["row"]
    assert name in ("tome", "pitome", "grid", "pool", "transprune") or lines["row"] != every


@pytest.mark.parametrize("name", ["atp", *NEWLINES])
def test_positions(name):
    """What an option says is what is done (that the engine does what a trace says, other tests prove)."""
    model = tiny.shared(dtype=F64, family="llava_next")
    prompt = tiny.prompt(model, [4, "image", 6], [(40, 24)])
    options = {"thresholds": tiny.modules(model)} if name == "atp" else {"keep": 0.5} | MORE.get(name, {})
    logits = []
    for positions in ("original", "contiguous"):
        _, trace, last = kept_of(model, prompt, name, positions=positions, **options)
        assert {cut.positions for cut in trace.cuts} == {positions}
        logits.append(last)
    probes.far(*logits)


@pytest.mark.parametrize("budget", [{"keep": 0.25}, {"average": 0.25}, {"keep": 4}], ids=str)
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_downsample_keeps_a_share_of_the_pixels(budget, family):
    """A quarter of 24 x 24 pixels is 12 x 12, and not 6 x 6; an int is of one view's 16 patches."""
    model = tiny.shared(dtype=F64, family=family)
    prompt = tiny.prompt(model, [4, "image", 6], [(40, 24)])
    with torch.no_grad():
        with vlmprune.patch(model, "downsample", **budget):
            got = model(**prompt).logits[0, -1]
        views = prompt["pixel_values"].flatten(0, -4).float()
        want = []
        for side in (12, 6):
            small = interpolate(views, (side, side), mode="bilinear", antialias=True)
            large = interpolate(small, (24, 24), mode="bilinear", antialias=True)
            want.append(
                model(**prompt | {"pixel_values": large.view_as(prompt["pixel_values"]).double()}).logits[0, -1]
            )
    probes.same(got, want[0])
    probes.far(got, want[1])


def test_downsample_that_changes_nothing_says_so():
    """24 x 24 pixels of which 0.97 are to be left: 23.6 a side, which is 24."""
    model = tiny.shared(dtype=F64)
    prompt = tiny.prompt(model, [4, "image", 6], [(24, 24)])
    with torch.no_grad():
        plain = model(**prompt).logits
        with vlmprune.patch(model, "downsample", keep=0.97), pytest.warns(UserWarning, match="changes nothing: 0.97"):
            assert torch.equal(model(**prompt).logits, plain)
        with vlmprune.patch(model, "downsample", keep=0.9):
            probes.far(model(**prompt).logits, plain)


def test_random_draws_by_seed_and_image_number():
    model = tiny.shared(dtype=F64)
    prompt = tiny.prompt(model, [2, "image", 3, "image", 1], [(24, 24), (24, 24)])
    seen = []
    for seed in (0, 1, 5):
        kept, _, _ = kept_of(model, prompt, "random", keep=6, seed=seed)
        draws = [torch.rand(16, generator=torch.Generator().manual_seed(seed * 1_000_003 + i)).tolist() for i in (0, 1)]
        assert kept == [reference.top(draw, 6, list(range(16))) for draw in draws]
        seen += kept
    assert len({*map(tuple, seen)}) == 6
    # the number is counted within a prompt: a batch row draws as the prompt alone
    with torch.no_grad(), vlmprune.patch(model, "random", keep=6, seed=1) as handle:
        model(**tiny.batch([prompt, prompt]))
        assert [handle.trace.kept(i) for i in range(4)] == seen[2:4] * 2


# ToDRE's first pick


def tower_rows(model, prompt, views, layer):
    """`(views, patches)` attention of the [CLS] token in one tower layer."""
    plain = tiny.shared(dtype=F64, attn="eager", family=model.config.model_type)
    with torch.no_grad():
        return plain.model.vision_tower(views, output_attentions=True).attentions[layer].mean(1)[:, 0, 1:]


def diverse(features, first, count, patches):
    """The picks of greedy maximal-sum diversity, from a first one."""
    x, picked = normalize(features, dim=-1), [first]
    while len(picked) < count:
        cost = (x @ x[picked].T).sum(1)
        picked.append(min((t for t in patches if t not in picked), key=lambda t: float(cost[t])))
    return sorted(picked)


@pytest.mark.parametrize(
    ("options", "others"),
    [
        ({"pivot": "cls"}, ["any", "early", "mean", "first"]),
        ({"pivot": "cls", "cls_layer": -2}, ["cls", "any"]),
        ({"pivot": "mean"}, ["cls", "first", "random"]),
        ({"pivot": "first"}, ["cls", "mean", "random"]),
        ({"pivot": "random"}, ["first", "seeded"]),
        ({"pivot": "random", "seed": 3}, ["first", "random"]),
    ],
    ids=str,
)
def test_todre_pivots_on_anyres_images(options, others):
    model = tiny.shared(dtype=F64, family="llava_next")
    differ = dict.fromkeys(others, False)
    for seed in range(4):
        prompt = tiny.prompt(model, [4, "image", 6], [(40, 24)], seed=seed)
        (kept,), trace, _ = kept_of(model, prompt, "todre", keep=6, tau=None, newlines="none", **options)
        (grid,) = trace.grids
        with torch.no_grad():
            (features,) = reference.image_features(model, prompt)
        patches = [t for t in range(grid.tokens) if not grid.newline[t]]
        views, thumbnail = prompt["pixel_values"][0, : grid.views], [t for t in patches if grid.view[t] == 0]
        last, early = (tower_rows(model, prompt, views, layer).flatten() for layer in (-1, -2))
        mean = features[patches].mean(0)
        draw = [
            torch.rand(grid.tokens, generator=torch.Generator().manual_seed(s * 1_000_003)).tolist() for s in (0, 3)
        ]
        firsts = {
            "cls": max(thumbnail, key=lambda t: float(last[grid.source[t]])),
            "any": max(patches, key=lambda t: float(last[grid.source[t]])),
            "early": max(thumbnail, key=lambda t: float(early[grid.source[t]])),
            "mean": max(patches, key=lambda t: float(torch.cosine_similarity(features[t], mean, dim=0))),
            "first": patches[0],
            "random": max(patches, key=lambda t: draw[0][t]),
            "seeded": max(patches, key=lambda t: draw[1][t]),
        }
        right = "early" if "cls_layer" in options else "seeded" if "seed" in options else options["pivot"]
        assert kept == diverse(features, firsts[right], 6, patches)
        for other in others:
            differ[other] |= kept != diverse(features, firsts[other], 6, patches)
    assert all(differ.values()), differ


@pytest.mark.parametrize("black", [False, True])
def test_todre_takes_the_first_pick_of_a_video_from_all_frames(black):
    """A first frame without anything in it decides nothing."""
    model = tiny.shared(dtype=F64, family="llava_next_video")
    late = 0
    for seed in range(4):
        prompt = tiny.prompt(model, [4, "video", 6], [], videos=[3], seed=seed)
        if black:
            prompt["pixel_values_videos"][0, 0] = 0
        (kept,), trace, _ = kept_of(model, prompt, "todre", keep=3, tau=None)
        (grid,) = trace.grids
        with torch.no_grad():
            (features,) = reference.video_features(model, prompt)
        rows = tower_rows(model, prompt, prompt["pixel_values_videos"][0], -1)
        frames = rows.view(3, 2, 2, 2, 2).mean((2, 4)).flatten()  # as the features are pooled
        first = int(frames.argmax())
        assert kept == diverse(features, first, 3, list(range(grid.tokens)))
        late += kept != diverse(features, int(frames[:4].argmax()), 3, list(range(grid.tokens)))
    assert late


# One score, other options


def choose(grid, scores, keep, scope):
    """Best patches by `(views, patches)` scores, with all newlines: by view with a share each, or of the image."""
    flat = scores.flatten().tolist()
    score = [0.0 if grid.newline[t] else flat[grid.source[t]] for t in range(grid.tokens)]
    patches = [t for t in range(grid.tokens) if not grid.newline[t]]
    views = [patches] if scope == "image" else [[t for t in patches if grid.view[t] == v] for v in range(grid.views)]
    kept = [t for view in views for t in reference.top(score, max(1, int(len(view) * keep)), view)]
    return sorted(kept + [t for t in range(grid.tokens) if grid.newline[t]])


@pytest.mark.parametrize("scope", ["view", "image"])
def test_vtc_cls_has_no_use_for_its_fallback_where_there_is_a_cls_token(scope):
    model = tiny.shared(dtype=F64, family="llava_next")
    prompt = tiny.prompt(model, [4, "image", 6], [(40, 24)])
    (kept,), trace, _ = kept_of(model, prompt, "vtc_cls", keep=0.3, fallback="received", scope=scope)
    (grid,) = trace.grids
    plain = tiny.shared(dtype=F64, attn="eager", family="llava_next")
    with torch.no_grad():
        views = prompt["pixel_values"][0, : grid.views]
        mean = plain.model.vision_tower(views, output_attentions=True).attentions[4].mean(1)
    assert kept == choose(grid, mean[:, 0, 1:], 0.3, scope)
    assert kept != choose(grid, mean[:, 1:, 1:].mean(1), 0.3, scope)
    assert kept != choose(grid, mean[:, 0, 1:], 0.3, "view" if scope == "image" else "image")


def test_a_fraction_after_a_deep_cut_is_of_what_entered():
    """Newlines compete at the first cut, so how many patches are left is known to nobody; and then stand apart."""
    model = tiny.shared(dtype=F64, family="llava_next")
    prompt = tiny.prompt(model, [4, "image", 6], [(40, 24)])
    methods = [FastV(layer=1, keep=0.8), FastV(layer=3, keep=0.4, newlines="all")]
    with torch.no_grad(), vlmprune.patch(model, methods) as handle:
        model(**prompt)
        (grid,), first, second = handle.trace.grids, handle.trace.kept(0, 0), handle.trace.kept(0, 1)
    assert len(first) == int(grid.tokens * 0.8)
    left = [t for t in first if not grid.newline[t]]
    assert [t for t in second if grid.newline[t]] == [t for t in first if grid.newline[t]]
    kept = [t for t in second if not grid.newline[t]]
    assert len(kept) == int(grid.patches * 0.4) not in (int(len(left) * 0.4), int(grid.tokens * 0.4))
