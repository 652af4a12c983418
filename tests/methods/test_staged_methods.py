"""PyramidDrop, V2Drop, DART and SparseVLM in a model, against a walk through its layers by hand."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import reference
import tiny
import torch
from torch.nn.functional import cosine_similarity

import vlmprune
from vlmprune.methods import Dart, PyramidDrop, SparseVLM, V2Drop
from vlmprune.methods.dart import farthest_from_pivots
from vlmprune.methods.sparsevlm import PLUS, RELEASED, recycled, split
from vlmprune.parts import Schedule, nearest, peaks
from vlmprune.parts.text_taps import raters, strongest
from vlmprune.patches import family_of

F64 = torch.float64
FAMILIES = pytest.mark.parametrize(
    "options",
    [{}, {"family": "llava_next"}, {"text": "mistral", "sliding_window": 20}],
    ids=["llava", "next", "mistral"],
)


def walk(model, prompt, cuts, choose, contiguous):
    """Kept tokens of every cut of a prompt with one image, and the last token's logits.

    `choose(stage, now)` returns the columns of the image that stay, and by column what becomes of its state; `now` has
    the states, columns and positions at the input of the layer, and of the layer before (`before`).
    """
    x, (image,) = reference.embed(model, prompt)
    now = {"x": x, "columns": list(range(len(x))), "positions": torch.arange(len(x)), "image": image, "before": None}
    kept, embedded = [], x
    for index in range(tiny.LAYERS):
        if index in cuts:
            now |= {"index": index, "embedded": embedded}
            stay, merged = choose(cuts.index(index), now)
            kept.append(sorted(c - image[0] for c in stay))
            x = now["x"].clone()
            for column, state in merged.items():
                x[now["columns"].index(column)] = state
            rows = [i for i, c in enumerate(now["columns"]) if c not in image or c in stay]
            positions = torch.arange(len(rows)) if contiguous else now["positions"][rows]
            now |= {"x": x[rows], "columns": [now["columns"][i] for i in rows], "positions": positions}
        here = {key: now[key] for key in ("x", "columns", "positions")} | {"index": index}
        now |= {"before": here, "x": reference.run_layer(model, index, now["x"], now["positions"])}
    return kept, model.lm_head(model.model.language_model.norm(now["x"])[-1])


def attention(model, now):
    """`(heads, rows, keys)` of the layer that `now` is the input of."""
    return reference.probabilities(model, now["index"], now["x"], now["positions"])


def mine(now):
    """Rows of the image."""
    return [i for i, c in enumerate(now["columns"]) if c in now["image"]]


def best(scores, now, count, rows=None):
    """Columns of the `count` best rows of the image."""
    rows = mine(now) if rows is None else rows
    return {now["columns"][rows[i]] for i in reference.top(scores.tolist(), count, list(range(len(rows))))}


def compare(model, prompt, method, cuts, choose, contiguous):
    """The method keeps what is kept by hand, and computes it; other positions would give something else."""
    with torch.no_grad(), vlmprune.patch(model, method) as handle:
        got = model(**prompt).logits[0, -1]
        trace = [handle.trace.kept(0, cut) for cut in range(len(handle.trace.cuts))]
        want, logits = walk(model, prompt, cuts, choose, contiguous)
        _, far = walk(model, prompt, cuts, choose, not contiguous)
    assert trace == want
    torch.testing.assert_close(got, logits, rtol=1e-9, atol=1e-9)
    assert (got - far).abs().max() > 1e-7
    return want


def ask(options):
    model = tiny.shared(dtype=F64, **options)
    return model, tiny.prompt(model, [4, "image", 6], [(40, 24)])


@FAMILIES
def test_pyramiddrop(options):
    model, prompt = ask(options)
    total = len(reference.embed(model, prompt)[1][0])
    ratios = (0.75, 0.5, 0.25)

    def choose(stage, now, row=-1):
        return best(attention(model, now).mean(0)[row][mine(now)], now, max(1, int(total * ratios[stage]))), {}

    want = compare(model, prompt, PyramidDrop(keep_ratios=ratios), [1, 2, 3], choose, True)
    assert walk(model, prompt, [1, 2, 3], partial(choose, row=-3), True)[0] != want


@FAMILIES
def test_v2drop(options):
    model, prompt = ask(options)
    total = len(reference.embed(model, prompt)[1][0])
    left = [max(1, int(total * ratio)) for ratio in (0.75, 0.5, 0.25)]

    def choose(stage, now):
        before = now["before"]
        rows = [before["columns"].index(c) for c in now["columns"]]
        change = (now["x"] - before["x"][rows]).norm(dim=-1)
        lines = {now["image"][0] + t for t in newlines}
        patches = [i for i in mine(now) if now["columns"][i] not in lines]
        return best(change[patches], now, left[stage], patches) | lines, {}

    method = V2Drop(keep_ratios=(0.75, 0.5, 0.25))
    with torch.no_grad(), vlmprune.patch(model, method) as handle:
        model(**prompt)
        (grid,) = handle.trace.grids
    newlines = grid.newline.nonzero().flatten().tolist()
    total = grid.patches
    left = [max(1, int(total * ratio)) for ratio in (0.75, 0.5, 0.25)]
    compare(model, prompt, method, [1, 2, 3], choose, False)


def test_v2drop_leaves_one_token():
    model, prompt = ask({})
    with torch.no_grad(), vlmprune.patch(model, "v2drop") as handle:
        model(**prompt)
        assert [len(handle.trace.kept(0, cut)) for cut in range(3)] == [8, 4, 1]


@FAMILIES
@pytest.mark.parametrize("parity", [None, "released"])
def test_dart(options, parity):
    model = tiny.model(dtype=F64, **options)
    prompt = tiny.prompt(model, [4, "image", 6], [(40, 24)])
    newline = {"newlines": "candidates"}
    norm = model.model.language_model.norm
    with torch.no_grad():
        norm.weight.copy_(torch.rand(len(norm.weight), generator=torch.Generator().manual_seed(0)) * 4)

    def choose(stage, now, texts=4):
        before, here = now["before"], mine(now)
        layer = model.model.language_model.layers[1]
        dim = layer.self_attn.head_dim
        read = layer.input_layernorm(before["x"])
        cos, sin = (c[0] for c in model.model.language_model.rotary_emb(read[None], before["positions"][None]))
        key = reference.rotate(layer.self_attn.k_proj(read).view(len(read), -1, dim).transpose(0, 1), cos, sin)
        lengths = key.abs().sum((0, 2))
        unit = norm(now["x"])
        images = sorted(here, key=lambda i: -lengths[i])[:4]
        text = sorted(range(here[-1] + 1, len(unit)), key=lambda i: -lengths[i])[:texts]
        kept, rest = set(images), 10 - 4
        for turn, pivot in enumerate([*images, *text]):
            take = rest // 8 + (turn < rest % 8) if parity is None else 1
            like = {i: float(cosine_similarity(unit[pivot], unit[i], 0)) for i in here if i not in kept}
            kept |= set(sorted(like, key=like.get)[:take])
        return {now["columns"][i] for i in kept}, {}

    want = compare(model, prompt, Dart(keep=10, parity=parity, **newline), [2], choose, False)
    assert len(want[0]) == (12 if parity else 10)


def test_dart_counts_and_repeating_pivots():
    """As released 4 + 8 (K // 8): 196, 132, 68."""
    torch.manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(1, 60, 5), dim=-1)
    among = torch.ones(1, 60, dtype=torch.bool)
    among[:, 50:] = False
    lengths = torch.rand(1, 60)
    for count in (1, 3, 4, 5, 12, 50):
        kept = farthest_from_pivots(unit, unit[:, 50:54], lengths, among, [count])
        assert int(kept.sum()) == count
        assert not (kept & ~among).any()
    facts = family_of(tiny.shared()).facts(tiny.shared().model)
    for kept, made in ((192, 196), (128, 132), (64, 68)):
        (cut,) = Dart(keep=kept, parity="released").cuts(facts)
        assert 4 + 8 * (cut.reduce.keywords["schedule"].left(576, 0) // 8) == made
    assert Dart().cuts(facts)[0].reduce.keywords["schedule"].left(576, 0) == 128


@FAMILIES
@pytest.mark.parametrize("version", ["v1", "+"])
def test_sparsevlm(options, version):
    model, prompt = ask(options)
    newline = {"newlines": "candidates"}
    method = SparseVLM(keep=9, version=version, **newline)
    facts = family_of(model).facts(model.model)
    total = len(reference.embed(model, prompt)[1][0])
    schedule = method.schedule([1, 2, 3], tiny.LAYERS, total)
    left = [schedule.left(total, stage) for stage in range(3)]
    assert left[-1] == 9

    def choose(stage, now, rating=True):
        here, image, x = mine(now), now["image"], now["embedded"]
        text = list(range(image[-1] + 1, len(x)))
        points = (x[list(image)] @ x[text].T).softmax(-1).mean(0)
        rate = [c for c, p in zip(text, points, strict=True) if p > points.mean() or not rating]
        before = now["before"]
        heads = attention(model, before)  # the layer before the cut
        rows = [before["columns"].index(c) for c in rate]
        keys = [before["columns"].index(now["columns"][i]) for i in here]
        seen = heads[:, rows][:, :, keys].mean(1)
        if version == "+":
            chosen = seen[seen.sum(-1).topk(2).indices].mean(0)  # 14 of 32 heads, of 4
            layer = model.model.language_model.layers[before["index"]]
            flat = torch.ones(len(before["x"]), layer.self_attn.head_dim, dtype=F64)
            cos, sin = (c[0] for c in model.model.language_model.rotary_emb(flat[None], before["positions"][None]))
            turned = reference.rotate(flat, cos, sin)
            near = (turned @ turned.T) / layer.self_attn.head_dim**0.5
            column, window = torch.arange(len(near)), reference.window_of(model, before["index"])
            hidden = column > column[:, None]
            hidden |= column <= column[:, None] - window if window else False
            near = near.masked_fill(hidden, -torch.inf).softmax(-1)[rows][:, keys].mean(0)
            return best(torch.where(near > 0, chosen / near, 0), now, left[stage]), {}
        scores = seen.mean(0)
        number = split(left[stage], len(here))
        order = sorted(range(len(here)), key=lambda i: -scores[i])
        strong, pool = order[:number], sorted(order[number : number + recycled(len(here) - number)[0]])
        x = now["x"][[here[i] for i in pool]]
        apart = torch.cdist(x, x) / x.shape[-1] ** 0.5
        density = torch.exp(-(apart.sort(-1).values[:, :5] ** 2).mean(-1))
        rise = [
            min((apart[i, j] for j in range(len(x)) if density[j] > density[i]), default=apart.max())
            for i in range(len(x))
        ]
        peak = density * torch.stack(rise)
        centres = sorted(range(len(x)), key=lambda i: -peak[i])[: left[stage] - number]
        groups = {centre: [centre] for centre in centres}
        for i in set(range(len(x))) - set(centres):
            groups[min(centres, key=lambda c: float(apart[i, c]))].append(i)
        column = lambda i: now["columns"][here[pool[i]]]  # noqa: E731
        merged = {column(centre): x[group].mean(0) for centre, group in groups.items()}
        return {now["columns"][here[i]] for i in strong} | set(merged), merged

    want = compare(model, prompt, method, [1, 2, 3], choose, version == "v1")
    assert [len(kept) for kept in want] == left
    assert walk(model, prompt, [1, 2, 3], partial(choose, rating=False), version == "v1")[0] != want
    assert len(method.cuts(facts)) == 3


@pytest.mark.parametrize("version", ["v1", "+"])
def test_sparsevlm_rates_a_row_of_a_batch_as_alone(version):
    """Texts of different lengths, the shorter filled up to the longer."""
    model = tiny.shared(dtype=F64)
    prompts = [tiny.prompt(model, [3, "image", text], [(24, 24)], seed=text) for text in (1, 3, 9)]
    with torch.no_grad(), vlmprune.patch(model, SparseVLM(keep=6, version=version)) as handle:
        model(**tiny.batch(prompts))
        together = handle.trace.cuts[0].scores
        for row, prompt in enumerate(prompts):
            model(**prompt)
            torch.testing.assert_close(together[row], handle.trace.cuts[0].scores[0])


def test_sparsevlm_has_the_released_counts():
    """With what it recycles: 309, 204 and 113 tokens where 300, 200 and 110 are kept, and so on."""
    method = SparseVLM()
    counts = [method.counts(kept) for kept in RELEASED]
    assert counts == [[309, 204, 113], [312, 117, 39], [249, 55, 27], [82, 32, 18]]
    layers, depth = [3, 7, 16], 32
    means = []
    for left in counts:
        edges = pairwise([0, *layers, depth])
        means.append(sum(n * (b - a) for n, (a, b) in zip([576, *left], edges, strict=True)) / depth)
    assert means == pytest.approx([206.5, 145.4, 114.1, 82.3], abs=0.07)
    for options, index in (
        ({}, 0),
        ({"average": 206}, 0),
        ({"average": 145}, 1),
        ({"average": 82}, 3),
        ({"keep": 18}, 3),
    ):
        made = SparseVLM(**options).schedule(layers, depth, 576)
        assert made.ratios == tuple(n / 576 for n in counts[index])
    assert [SparseVLM().schedule(layers, depth, 576).left(576, stage) for stage in range(3)] == counts[0]
    assert SparseVLM(version="+").counts(PLUS[0]) == [300, 200, 118]


def test_sparsevlm_splits_every_budget():
    for kept, total, (top, made) in ((300, 576, (83, 9)), (200, 309, (33, 4)), (110, 204, (29, 3))):
        assert recycled(total - kept) == (top, made)
        assert split(kept + made, total) == kept
    for total in range(1, 80):
        for left in range(1, total + 1):
            kept = split(left, total)
            assert 0 <= kept <= left
            assert left - kept <= recycled(total - kept)[0], (left, total)


def test_raters_and_heads():
    visual, text = torch.eye(3)[None].double(), torch.tensor([[[4.0, 0, 0], [0, 3, 0], [0, 0, 0], [9, 9, 9]]]).double()
    said = torch.tensor([[True, True, True, False]])
    points = (visual[0, :2] @ text[0, :3].T).softmax(-1).mean(0)
    seen = torch.tensor([[True, True, False]])
    assert raters(visual, text, seen, said)[0, :3].tolist() == (points > points.mean()).tolist() == [True, True, False]
    alike = torch.zeros(1, 2, 3).double()
    assert raters(visual, alike, seen, torch.ones(1, 2, dtype=torch.bool)).all()  # none above the mean
    heads = torch.tensor([[[0.9, 0.0], [0.1, 0.1], [0.3, 0.3], [0.0, 0.9]]])
    got = strongest(heads, torch.tensor([[True, False]]), 4)  # two of four, by what is alive
    torch.testing.assert_close(got, torch.tensor([[(0.9 + 0.3) / 2, 0.3 / 2]]))


def test_density_peaks():
    x = torch.tensor([[0.0, 0.1, 0.2, 5.0, 5.1, 9.0, 77.0]])[..., None]
    among = torch.tensor([[True] * 6 + [False]])
    centres, into = peaks(x, among, [2], 6, neighbours=2)
    assert centres[0].nonzero().flatten().tolist() == [0, 3]
    assert into[0].tolist() == [0, 0, 0, 3, 3, 3, 6]
    assert not peaks(x, among & False, [0], 0)[0].any()


def test_a_stretched_schedule_meets_its_budget():
    layers, depth = [3, 17, 22], 32
    for average in (0.7, 0.3525, 0.25, 0.15, 0.1):
        made = Schedule.at(layers, depth, (0.5, 0.25, 0.0), None, average)
        counts = [10**6, *(made.left(10**6, stage) for stage in range(3))]
        mean = sum(n * (b - a) for n, (a, b) in zip(counts, pairwise([0, *layers, depth]), strict=True)) / depth
        assert mean == pytest.approx(average * 10**6, abs=4)
    with pytest.raises(ValueError, match=r"nothing left after the first one the average is 0\.094"):
        Schedule.at(layers, depth, (0.5, 0.25, 0.0), None, 0.09)
    assert [Schedule((0.5, 0.25, 0.0), keep=144).left(576, stage) for stage in range(3)] == [360, 252, 144]
    both = [Schedule((0.5,), (1.0,)), Schedule((0.1,), (1.0,))]
    assert [nearest(both, keep, None, 100) for keep in (None, 0.4, 12, 0.9, 500)] == [0, 0, 1, 0, 0]
    assert nearest(both, None, 12, 100) == 1


@pytest.mark.parametrize("method", [PyramidDrop, V2Drop, Dart, SparseVLM])
def test_published_averages(method):
    """Of 576 tokens in 32 layers."""
    facts = vlmprune.parts.ModelFacts("llava", 24, 22, True, 32, False, 576)
    made = method().cuts(facts)
    schedules = [cut.reduce.keywords["schedule"] for cut in made]
    schedules = [s(576) if isinstance(s, partial) else s for s in schedules]
    counts = [576, *(schedule.left(576, stage) for stage, schedule in enumerate(schedules))]
    mean = (
        sum(n * (b - a) for n, (a, b) in zip(counts, pairwise([0, *(c.at.layer for c in made), 32]), strict=True)) / 32
    )
    assert round(mean, 1) == {"pyramiddrop": 270.0, "v2drop": 202.8, "dart": 156.0, "sparsevlm": 206.5}[method.name]


def test_wrong_options():
    with pytest.raises(ValueError, match="keep_ratios has 2 entries, prune_layers 3"):
        PyramidDrop(keep_ratios=(0.5, 0.2))
    with pytest.raises(ValueError, match="three cuts"):
        SparseVLM(prune_layers=(3, 7))
    with pytest.raises(ValueError, match=r"keep_ratios=\(0\.5, 0\.2, 0\.0\)"):
        PyramidDrop(keep_ratios=(0.5, 0.2, 0.0))
    assert V2Drop(keep_ratios=(0.5, 0.2, 0.0)).keep_ratios[-1] == 0
