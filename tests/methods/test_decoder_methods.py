"""TransPrune and ToDRE in a model, against a walk through its layers by hand."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import probes
import pytest
import reference
import tiny
import torch
from torch.nn.functional import cosine_similarity, normalize

import vlmprune
from vlmprune import registry
from vlmprune.methods import GlobalCom2, TransPrune
from vlmprune.methods.transprune import accumulated
from vlmprune.parts import Transition
from vlmprune.patches import family_of

F64 = torch.float64
FAMILIES = [{}, {"family": "llava_next"}, {"text": "mistral", "sliding_window": 20}]


def blocks(model, index, x, positions):
    """Output of a decoder layer, and what its two blocks read and wrote."""
    layer = model.model.language_model.layers[index]
    weights = reference.probabilities(model, index, x, positions)
    read = layer.input_layernorm(x)
    value = layer.self_attn.v_proj(read).view(len(x), -1, layer.self_attn.head_dim).transpose(0, 1)
    value = value.repeat_interleave(weights.shape[0] // value.shape[0], 0)
    wrote = layer.self_attn.o_proj((weights @ value).transpose(0, 1).flatten(1))
    x = x + wrote
    read2 = layer.post_attention_layernorm(x)
    wrote2 = layer.mlp(read2)
    return x + wrote2, [(read, wrote), (read2, wrote2)], weights.mean(0)


def transprune_by_hand(
    model, prompt, mode, ratios, prune=(1, 2, 3), watched=(1, 2, 3), contiguous=True, alpha=0.5, newlines=(), drop=False
):
    """Kept tokens of every cut for a prompt with one image, and the last token's logits.

    `newlines` are tokens of the image that do not compete: they stay, or go at the first cut. By default all compete.
    """
    x, (image,) = reference.embed(model, prompt)
    columns, positions = list(range(len(x))), torch.arange(len(x))
    change, kept = dict.fromkeys(image, 0.0), []
    total = len(image) - len(newlines)
    for index in range(tiny.LAYERS):
        here = [i for i, c in enumerate(columns) if c in image and c - image[0] not in newlines]
        if index in prune:
            ratio = ratios[prune.index(index)]
            weights = reference.probabilities(model, index, x, positions).mean(0)
            rows = [i for i, c in enumerate(columns) if c > image[-1]]
            attention = weights[rows][:, here].mean(0)
            score = torch.stack([change[columns[i]] for i in here])
            if mode == "official":
                score, attention = score / (score.sum() + 1e-8), attention / (attention.sum() + 1e-8)
            best = reference.top(
                (alpha * score + (1 - alpha) * attention).tolist(), max(1, int(total * ratio)), list(range(len(here)))
            )
            stay = {columns[here[i]] for i in best} | {image[0] + t for t in newlines if not drop}
            kept.append(sorted(c - image[0] for c in stay))
            rows = [i for i, c in enumerate(columns) if c not in image or c in stay]
            x, columns, positions = x[rows], [columns[i] for i in rows], positions[rows]
            if contiguous:
                positions = torch.arange(len(x))
        x, both, _ = blocks(model, index, x, positions)
        if index + 1 in watched:
            here = [i for i, c in enumerate(columns) if c in image]
            for read, wrote in both:
                cosine = cosine_similarity(wrote, read, dim=-1)
                direction = 1 - cosine if mode == "official" else 1 - cosine.abs()
                among = list(range(len(x))) if mode == "official" else here
                weight = direction[among].softmax(0)
                magnitude = wrote.norm(dim=-1) / read.norm(dim=-1)
                for i, w in zip(among, weight, strict=True):
                    if columns[i] in change:
                        change[columns[i]] = change[columns[i]] + w * magnitude[i]
    return kept, model.lm_head(model.model.language_model.norm(x)[-1])


@pytest.mark.parametrize("options", FAMILIES, ids=["llava", "next", "mistral"])
@pytest.mark.parametrize("mode", ["official", "paper"])
def test_transprune(options, mode):
    model = tiny.shared(dtype=F64, **options)
    prompt = tiny.prompt(model, [4, "image", 6], [(40, 24)])
    ratios = (0.875, 0.625, 0.25)
    with torch.no_grad():
        want, logits = transprune_by_hand(model, prompt, mode, ratios)
        other, far = transprune_by_hand(model, prompt, mode, ratios, contiguous=False)
        with vlmprune.patch(model, "transprune", mode=mode, keep_ratios=ratios) as handle:
            got = model(**prompt).logits[0, -1]
            assert [handle.trace.kept(0, cut) for cut in range(3)] == want
    torch.testing.assert_close(got, logits, rtol=1e-9, atol=1e-9)
    assert (got - far).abs().max() > 1e-7
    assert other[0] == want[0]  # the first cut comes before positions differ


@pytest.mark.parametrize(
    ("depth", "cuts", "layers"),
    [
        (6, [1, 2, 3], range(1, 4)),
        (12, [3, 4, 5], range(3, 6)),
        (28, [6, 8, 10], range(6, 11)),
        (32, [7, 9, 12], range(7, 13)),
        (40, [9, 11, 15], range(9, 16)),
        (64, [14, 18, 24], range(14, 25)),
    ],
)
def test_transprune_accumulates_over_every_layer_up_to_each_cut(depth, cuts, layers):
    """At every depth from the first cut's layer to the last one's without a hole, each cut's own layer included."""
    model = tiny.shared()
    facts = replace(family_of(model).facts(model.model), decoder_layers=depth)
    made = TransPrune().cuts(facts)
    assert [cut.at.layer for cut in made] == cuts
    for cut, p in zip(made, cuts, strict=True):
        # a tap counts layers from 0
        assert [tap.layer + 1 for tap in cut.see if isinstance(tap, Transition)] == [n for n in layers if n <= p]


def test_transprune_layers_with_gaps_scale_one_by_one():
    assert accumulated((6, 9, 11), (7, 9, 12), 32) == [6, 9, 11]
    assert accumulated((6, 9, 11), (7, 9, 12), 64) == [12, 18, 22]
    assert accumulated((6, 9, 11), (7, 9, 12), 6) == [1, 2]  # 9 is the second cut
    assert accumulated((2, 7, 12), (7, 9, 12), 6) == [1, 3]  # 12 is the third cut
    assert accumulated((7,), (7, 9, 12), 64) == [14]


def test_transprune_counts():
    plain = TransPrune(prune_layers=(7, 9, 12), keep_ratios=(0.7, 0.29, 0.05))
    for total in (1, 3, 10, 19, 100, 110, 576, 2343):
        # as arithmetic has it, and not as floats have it: 0.29 of 100 is 29; at least one token
        exact = [Fraction(r).limit_denominator(100) for r in plain.keep_ratios]
        assert [probes.left(plain, total, i) for i in range(3)] == [max(1, int(total * r)) for r in exact]
    assert (probes.left(plain, 100, 1), probes.left(plain, 10, 2)) == (29, 1)
    share = (2 / 32, 3 / 32, 20 / 32)
    for method in (plain, TransPrune(keep=5), TransPrune(keep=0.5), TransPrune(average=40), TransPrune(average=0.5)):
        assert [probes.left(method, 0, i, share) for i in range(3)] == [0, 0, 0]
        assert all(probes.left(method, 100, i, share) >= 1 for i in range(3))


@pytest.mark.parametrize("method", ["transprune", "fastv", "random", "todre"])
def test_an_image_whose_tokens_are_all_gone(method):
    """GlobalCom² may leave nothing of an image when its budget is a token or two; later methods live with that."""
    model = tiny.shared(dtype=F64, family="llava_next")
    first = GlobalCom2(keep=1, newlines="none")
    second = registry.find(method)(keep=0.5)
    both = tiny.batch(
        [tiny.prompt(model, [4, "image", 6], [(40, 24)]), tiny.prompt(model, [3, "image", 2], [(24, 24)])]
    )
    with torch.no_grad(), vlmprune.patch(model, [first, second]) as handle:
        assert torch.isfinite(model(**both).logits).all()
        assert min(counts["patches_after"] for counts in handle.trace.counts) == 0


@pytest.mark.parametrize("mode", ["official", "paper"])
@pytest.mark.parametrize(
    ("options", "by_hand", "without"),
    [
        ({"alpha": 0.9}, {"alpha": 0.9}, {}),
        ({"alpha": 0.0}, {"alpha": 0.0}, {}),
        ({"accumulate_layers": (7, 12)}, {"watched": (1, 3)}, {}),  # of 32 layers: the first cut and the last
        ({"accumulate_layers": (7,)}, {"watched": (1,)}, {}),
        ({"prune_layers": (8, 16, 24)}, {}, {"prune": (1, 2)}),
        ({"prune_layers": (7, 24), "keep_ratios": (0.6, 0.2)}, {"prune": (1, 3), "ratios": (0.6, 0.2)}, {}),
        ({"newlines": "all"}, {"drop": False}, {}),
        ({"newlines": "none"}, {"drop": True}, {}),
        ({"keep": 0.4}, {"ratios": (0.9, 0.7, 0.4)}, {}),
        ({"keep": 5}, {"ratios": None}, {}),
    ],
    ids=str,
)
def test_transprune_options(mode, options, by_hand, without):
    model = tiny.shared(dtype=F64, family="llava_next")
    prompt = tiny.prompt(model, [4, "image", 6], [(40, 24)], seed=1)
    ratios = (0.875, 0.625, 0.25)
    given = {"keep_ratios": ratios} | options
    with torch.no_grad():
        with vlmprune.patch(model, "transprune", mode=mode, **given) as handle:
            logits = model(**prompt).logits[0, -1]
            (grid,) = handle.trace.grids
            got = [handle.trace.kept(0, cut) for cut in range(len(handle.trace.cuts))]
        by_hand = {"ratios": ratios, "mode": mode} | by_hand
        if "drop" in by_hand:
            by_hand["newlines"] = [t for t in range(grid.tokens) if grid.newline[t]]
        if by_hand["ratios"] is None:
            stretch = (1 - 5 / grid.tokens) / 0.75
            by_hand["ratios"] = (1 - stretch * 0.125, 1 - stretch * 0.375, 5.5 / grid.tokens)
        want, far = transprune_by_hand(model, prompt, **by_hand)
        twin, _ = transprune_by_hand(model, prompt, mode=mode, ratios=ratios, **without)
    assert got == want != twin
    torch.testing.assert_close(logits, far, rtol=1e-9, atol=1e-9)


def test_transprune_modes_differ():
    model = tiny.shared(dtype=F64, family="llava_next")
    prompt = tiny.prompt(model, [4, "image", 6], [(40, 24)])
    kept = {}
    for mode in ("official", "paper"):
        with torch.no_grad(), vlmprune.patch(model, "transprune", mode=mode) as handle:
            model(**prompt)
            kept[mode] = handle.trace.kept()
    assert kept["official"] != kept["paper"]


@pytest.mark.parametrize("options", FAMILIES, ids=["llava", "next", "mistral"])
@pytest.mark.parametrize("objective", ["max_sum", "max_min"])
def test_todre_stage1(options, objective):
    model = tiny.shared(dtype=F64, **options)
    plain = tiny.shared(dtype=F64, attn="eager", **options)
    prompt = tiny.prompt(model, [4, "image", 6], [(40, 24)])
    with torch.no_grad(), vlmprune.patch(model, "todre", keep=9, objective=objective, tau=None) as handle:
        model(**prompt)
        grid, got = handle.trace.grids[0], handle.trace.kept_patches()
        (features,) = reference.image_features(plain, prompt)
        views = prompt["pixel_values"] if prompt["pixel_values"].ndim == 4 else prompt["pixel_values"][0, : grid.views]
        row = plain.model.vision_tower(views, output_attentions=True).attentions[-1][0].mean(0)[0, 1:]
    patches = [t for t in range(grid.tokens) if not grid.newline[t]]
    thumbnail = [t for t in patches if grid.view[t] == 0]
    x = normalize(features, dim=-1)
    picked = [max(thumbnail, key=lambda t: float(row[grid.source[t]]))]
    while len(picked) < 9:
        cosine = x @ x[picked].T
        cost = cosine.sum(1) if objective == "max_sum" else cosine.max(1).values
        picked.append(min((t for t in patches if t not in picked), key=lambda t: float(cost[t])))
    assert got == sorted(picked)


@pytest.mark.parametrize("options", FAMILIES, ids=["llava", "next", "mistral"])
@pytest.mark.parametrize("parts", [[4, "image", 6], [4, "image", 3, "image", 5]], ids=["one", "two"])
def test_todre_stage2_shares(options, parts):
    model = tiny.shared(dtype=F64, **options)
    prompt = tiny.prompt(model, parts, [(40, 24), (20, 70)][: parts.count("image")])
    with torch.no_grad():
        x, images = reference.embed(model, prompt)
        visual = [c for image in images for c in image]
        for index in range(3):
            x, _, weights = blocks(model, index, x, torch.arange(len(x)))
        text = [c for c in range(visual[0], len(x)) if c not in visual]
        to_image = float(weights[text][:, visual].sum(1).mean())
        to_text = float(weights[visual][:, text].sum(1).mean())
        assert (to_text > 0) == (len(images) > 1)
        for tau, drops in ((max(to_image, to_text) + 1e-9, True), (max(to_image, to_text) - 1e-9, False)):
            with vlmprune.patch(model, "todre", keep=1.0, tau=tau) as handle:
                model(**prompt)
                lengths = handle.trace.kv_lengths
            assert lengths == [len(x)] * 3 + [len(x) - len(visual) * drops]


def test_todre_decides_per_sample():
    model = tiny.shared(dtype=F64)
    prompts = [tiny.prompt(model, [4, "image", 6], [(24, 24)], seed=s) for s in range(4)]
    shares = []
    with torch.no_grad():
        for prompt in prompts:
            x, (image,) = reference.embed(model, prompt)
            for index in range(3):
                x, _, weights = blocks(model, index, x, torch.arange(len(x)))
            shares.append(float(weights[image[-1] + 1 :][:, list(image)].sum(1).mean()))
        tau = sum(sorted(shares)[1:3]) / 2
        with vlmprune.patch(model, "todre", keep=1.0, tau=tau) as handle:
            model(**tiny.batch(prompts))
            left = [counts["patches_after"] for counts in handle.trace.counts]
    assert left == [0 if share < tau else 16 for share in shares]
    assert sorted(set(left)) == [0, 16]
