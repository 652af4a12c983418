"""CATP in a model, against a walk through its layers by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import reference
import tiny
import torch
from probes import hand_layout, raster
from torch.nn.functional import cosine_similarity
from waits import reads

import vlmprune
from vlmprune.methods import Catp
from vlmprune.parts import OwnText, QuestionMarks, coverage, queries

F64 = torch.float64
ALIGNMENT, LIKENESS = 3.0, 0.04  # so that both halves of a score decide


def alike(x, y):
    """Cosine of two vectors."""
    return float(cosine_similarity(x, y, dim=0))


def cover(patches, text, keep, alignment):
    """Facility location, by loops over pairs: similarities from 0 to 1."""
    close = [[(1 + alike(x, y)) / 2 for y in patches] for x in patches]
    order = []
    for _ in range(keep):
        worth = {}
        for j in (j for j in range(len(patches)) if j not in order):
            covered = sum(max(close[i][y] for y in (*order, j)) for i in range(len(patches)))
            worth[j] = covered + alignment * sum((1 + alike(patches[y], text)) / 2 for y in (*order, j))
        order.append(max(worth, key=worth.get))
    return sorted(order)


def walk(model, prompt, texts, entering, left, alignment=ALIGNMENT, likeness=LIKENESS):
    """Kept tokens of every picture behind every cut, and the last token's logits.

    Args:
        texts: columns of every picture's own text.
        entering, left: patches of every picture behind the first cut, and in the end.
    """
    x, images = reference.embed(model, prompt)
    columns, kept = torch.arange(len(x)), []
    *shown, query = images

    def stay(chosen):
        nonlocal x, columns
        pictured = {c for image in images for c in image}
        rows = [r for r, c in enumerate(columns.tolist()) if c not in pictured or c in chosen]
        x, columns = x[rows], columns[rows]
        kept.append([sorted(c - image[0] for c in chosen if c in image) for image in images])

    def rows_of(some):
        return [r for r, c in enumerate(columns.tolist()) if any(c in image for image in some)]

    chosen = set()
    for image, text, number in zip(images, texts, entering, strict=True):
        picks = cover(x[list(image)], x[list(text)].mean(0), number, alignment)
        chosen |= {image[0] + t for t in picks}
    stay(chosen)
    before = None
    for index in range(tiny.LAYERS):
        if index == 1:
            now = reference.probabilities(model, index, x, columns).mean(0)[-1]
            mean = x[columns >= query[0]].mean(0)
            score = {r: max(0.0, float(now[r] - before[r])) + likeness * alike(x[r], mean) for r in rows_of(shown)}
            best = sorted(score, key=score.get, reverse=True)[: sum(left[:-1])]
            stay({int(columns[r]) for r in [*best, *rows_of([query])]})
        if index == 2:
            mean = x[columns < query[0]].mean(0)
            best = sorted(rows_of([query]), key=lambda r: alike(x[r], mean), reverse=True)[: left[-1]]
            stay({int(columns[r]) for r in [*best, *rows_of(shown)]})
        before = reference.probabilities(model, index, x, columns).mean(0)[-1]
        x = reference.run_layer(model, index, x, columns)
    return kept, model.lm_head(model.model.language_model.norm(x)[-1])


def run(model, prompt, **options):
    """Kept tokens of every picture behind every cut, and the last token's logits."""
    with torch.no_grad(), vlmprune.patch(model, "catp", **options) as handle:
        logits = model(**prompt).logits[0, -1]
        trace = handle.trace
        return [[trace.kept(i, cut) for i in range(len(trace.grids))] for cut in range(len(trace.cuts))], logits


@pytest.fixture
def model():
    return tiny.shared(dtype=F64)


def shots(model, seed=0):
    """Two demonstrations and a query, and the columns of their texts."""
    prompt = tiny.prompt(model, [3, "image", 4, "image", 5, "image", 6], [(24, 24)] * 3, seed)
    _, images = reference.embed(model, prompt)
    ends = [*(image[0] for image in images[1:]), prompt["input_ids"].shape[1]]
    return prompt, [range(image[-1] + 1, end) for image, end in zip(images, ends, strict=True)], len(images[0])


def test_cuts_are_those_by_hand(model):
    prompt, texts, size = shots(model)
    keep, entering = 4, (size + 4) // 2
    kept, logits = run(model, prompt, keep=keep, alignment=ALIGNMENT, likeness=LIKENESS)
    with torch.no_grad():
        want, expected = walk(model, prompt, texts, [entering] * 3, [keep] * 3)
        assert kept == want
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
        twins = [{"texts": texts[::-1]}, {"alignment": 0}, {"likeness": 0}, {"likeness": 100}]
        for twin in twins:
            given = {"texts": texts, "entering": [entering] * 3, "left": [keep] * 3} | twin
            assert walk(model, prompt, **given)[0] != want, twin
    assert [len(image) for image in kept[0]] == [entering] * 3
    assert len(kept[1][0]) + len(kept[1][1]) == 2 * keep  # together, and not in equal parts
    assert len(kept[1][0]) != keep
    assert [len(image) for image in (kept[1][2], kept[2][2])] == [entering, keep]


@pytest.mark.parametrize("seed", range(1, 7))
@pytest.mark.parametrize("likeness", [LIKENESS, 50])
def test_more_prompts(model, seed, likeness):
    prompt, texts, size = shots(model, seed)
    keep = 3 + seed
    kept, _ = run(model, prompt, keep=keep, alignment=ALIGNMENT, likeness=likeness)
    with torch.no_grad():
        want, _ = walk(model, prompt, texts, [(size + keep) // 2] * 3, [keep] * 3, likeness=likeness)
    assert kept == want


def test_a_picture_alone_loses_all_at_once(model):
    prompt = tiny.prompt(model, [5, "image", 6], [(24, 24)])
    with torch.no_grad():
        x, (image,) = reference.embed(model, prompt)
    kept, _ = run(model, prompt, keep=5, alignment=ALIGNMENT)
    text = x[image[-1] + 1 :].mean(0)
    assert kept == [[cover(x[list(image)], text, 5, ALIGNMENT)]] * 3
    assert kept[0][0] != cover(x[list(image)], x[: image[0]].mean(0), 5, ALIGNMENT)


def test_reads_of_a_prefill_are_those_that_ls_tells(model, monkeypatch):
    monkeypatch.setattr(coverage, "on_host", lambda x: False)  # what it does on a GPU
    prompt, *_ = shots(model)
    del prompt["attention_mask"]
    videos = tiny.shared(family="llava_onevision", tower="siglip", text="qwen2")
    mixed = tiny.prompt(videos, [3, "video", 2, "image", 4], [(24, 24)], videos=[2])
    del mixed["attention_mask"]
    for made, given, more in ((model, prompt, 1), (videos, mixed, 2 + 5)):
        made(**given)
        plain = reads(lambda: made(**given), monkeypatch)  # noqa: B023
        with vlmprune.patch(made, "catp", keep=4):
            made(**given)
            pruned = reads(lambda: made(**given), monkeypatch)  # noqa: B023
        assert pruned.total <= plain.total + more + Catp.syncs, (dict(pruned.seen), dict(plain.seen))


def test_average_is_met(model):
    prompt, _, size = shots(model)
    kept, _ = run(model, prompt, average=6)
    layers = [sum(map(len, kept[cut])) for cut in (0, 1, 2, 2)]
    assert abs(sum(layers) / tiny.LAYERS / 3 - 6) < 1
    assert [len(i) for i in kept[0]] != [(size + 6) // 2] * 3


def test_pictures_that_stand_together_share_the_text_behind(model):
    prompt = tiny.prompt(model, [3, "image", "image", 5, "image", 6], [(24, 24)] * 3)
    _, images = reference.embed(model, prompt)
    size, behind = len(images[0]), range(images[1][-1] + 1, images[2][0])
    texts = [behind, behind, range(images[2][-1] + 1, prompt["input_ids"].shape[1])]
    kept, _ = run(model, prompt, keep=4, alignment=ALIGNMENT, likeness=LIKENESS)
    with torch.no_grad():
        assert kept == walk(model, prompt, texts, [(size + 4) // 2] * 3, [4] * 3)[0]


def test_the_last_picture_is_the_query_even_beside_videos():
    grids = [raster(2, 2), raster(2, 2), raster(2, 2)]
    layout = hand_layout(*grids, sample=[0, 0, 1])
    assert queries(layout) == {0: 1}
    mixed = hand_layout(grids[0], replace(grids[1], frames=1), grids[2], sample=[0, 0, 1])
    assert queries(mixed) == {0: 1}
    assert queries(replace(mixed, position=mixed.position.flip(0))) == {0: 0}


def test_a_deep_inner_cut_is_refused(model):
    with pytest.raises(ValueError, match="layer=24 scales to 3; catp cuts there and one later, of 4 layers"):
        vlmprune.patch(model, "catp", keep=4, layer=24)


@pytest.mark.parametrize("layer", [0, 31, None, 1.5])
def test_bad_layers(layer):
    with pytest.raises(ValueError, match=r"layer=.* must be a layer from 1 to 30"):
        Catp(keep=4, layer=layer)


@dataclass
class Marked:
    """A prompt of one row that a tap looks at."""

    ids: torch.Tensor
    layout: object

    @property
    def sequence(self):
        real = torch.ones_like(self.ids, dtype=torch.bool)
        columns = torch.arange(self.ids.shape[1])[None]
        return SimpleNamespace(asked=lambda: real, columns=columns, prompt=self.ids.shape[1])

    def flat_index(self):
        return self.layout.position


def test_own_text_goes_by_the_template_marks():
    marks = QuestionMarks(opens=(20,), closes=(21,), silent=(20, 21, 30), tokenizer=None)
    embedded = torch.eye(12)[None]
    grid = raster(1, 2)

    def own(ids, starts):
        layout = replace(
            hand_layout(*[grid] * len(starts)), position=torch.tensor([[start, start + 1] for start in starts])
        )
        means = OwnText(0, marks).measure(None, embedded, Marked(torch.tensor([ids]), layout))
        return [row.nonzero().flatten().tolist() for row in means]

    #      0   1   2   3   4  5   6  7   8  9   10  11
    ids = [1, 20, 40, 41, 30, 5, 5, 42, 21, 43, 44, 45]
    assert own(ids, [5]) == [[2, 3, 7]]  # the question, on both sides of the picture
    ids = [1, 20, 5, 5, 30, 5, 5, 42, 43, 5, 5, 21]
    # silent tokens between pictures tell nothing; without text behind it a picture has what the user says
    assert own(ids, [2, 5, 9]) == [[7, 8], [7, 8], [7, 8]]
    ids = [1, 20, 5, 5, 40, 41, 5, 5, 42, 30, 43, 21]
    assert own(ids, [2, 6]) == [[4, 5], [8, 10]]
