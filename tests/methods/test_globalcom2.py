"""GlobalCom² in a model, against its description followed step by step."""

from __future__ import annotations

import math

import pytest
import reference
import tiny
import torch
from torch.nn.functional import cosine_similarity, interpolate

import vlmprune
from vlmprune import UnsupportedError
from vlmprune.methods import GlobalCom2, Random, TransPrune

F64 = torch.float64
SIZES = [(40, 24), (20, 70)]


def scores_by_hand(model, views, score):
    """`(views, patches)` scores from the tower's own hidden states."""
    tower = model.model.vision_tower
    states = tower(views, output_hidden_states=True).hidden_states
    if score == "distinct":
        first = int(model.config.vision_config.model_type == "clip_vision_model")
        x = states[-2][:, first:]
        return -cosine_similarity(x, x.mean(1, keepdim=True), dim=-1)
    layer, attention = tower.encoder.layers[-1], tower.encoder.layers[-1].self_attn
    x = layer.layer_norm1(states[-2])
    query = attention.q_proj(x)[:, 0].view(len(x), attention.num_heads, 1, -1)
    key = attention.k_proj(x)[:, 1:].view(len(x), 16, attention.num_heads, -1).transpose(1, 2)
    return (query * key).sum(-1).mean(1) * attention.head_dim**-0.5


def views_by_hand(grid, scores, ratio, tau=10.0):
    """Of every view of one image: its token numbers, the scores they are chosen by, and its share."""
    side, (down, across) = 4, grid.crops
    thumb = scores[0].view(side, side)
    cells = [[] for _ in range(down * across)]
    for r in range(side):
        for c in range(side):
            row, col = min(r // max(side // down, 1), down - 1), min(c // max(side // across, 1), across - 1)
            cells[row * across + col].append(float(thumb[r, c]))
    mass = [sum(cell) for cell in cells]
    weight = [math.exp((m - max(mass)) / tau) for m in mass]
    share = [w / (sum(weight) + 1e-8) for w in weight]
    ratios = [min(1.0, ratio * (1 + s - sum(share) / len(share))) for s in share]
    made = [(list(range(16)), thumb.flatten().tolist(), 16 * ratio)]
    rows, cols = grid.planes[1]
    guide = interpolate(thumb[None, None], (rows, cols), mode="bilinear", align_corners=False)[0, 0]
    for j, r in enumerate(ratios):
        mine = [t for t in range(grid.tokens) if grid.view[t] == j + 1 and not grid.newline[t]]
        local = torch.stack([scores[j + 1, int(grid.source[t]) % 16] for t in mine]) if mine else torch.zeros(0)
        far = torch.stack([guide[grid.row[t], grid.col[t]] for t in mine]) if mine else torch.zeros(0)
        both = local / local.norm().clamp(min=1e-12) + far / far.norm().clamp(min=1e-12)
        made.append((mine, both.tolist(), len(mine) * r))
    return made


def by_hand(grid, scores, ratio, tau=10.0):
    """Kept token numbers of one image, patches alone."""
    kept = []
    for mine, values, share in views_by_hand(grid, scores, ratio, tau):
        kept += [mine[i] for i in reference.top(values, int(share + 1e-6), list(range(len(mine))))]
    return sorted(kept)


def fixed_by_hand(grid, scores, ratio, count):
    """The same of so many patches."""
    beyond = []
    for mine, values, share in views_by_hand(grid, scores, ratio):
        best = sorted(range(len(mine)), key=lambda i, values=values: -values[i])
        beyond += [(place - share, mine[i]) for place, i in enumerate(best, 1)]
    return sorted(token for _, token in sorted(beyond)[:count])


@pytest.mark.parametrize(("tower", "score"), [("clip", "cls"), ("clip", "distinct"), ("siglip", "distinct")])
@pytest.mark.parametrize("keep", [0.25, 0.6, 20])
def test_choice_and_batch(tower, score, keep):
    model = tiny.shared(dtype=F64, family="llava_next", tower=tower)
    prompts = [tiny.prompt(model, [4, "image", 3 + s], [size], seed=s) for s, size in enumerate(SIZES)]
    with torch.no_grad(), vlmprune.patch(model, "globalcom2", keep=keep, score=score) as handle:
        both = tiny.batch(prompts)
        # as generate counts: rotary embeddings are float32 and would differ between shifted rows
        both["position_ids"] = (both["attention_mask"].cumsum(1) - 1).clamp(min=0)
        together = model(**both).logits[:, -1]
        got = [handle.trace.kept_patches(i) for i in range(2)]
        for i, prompt in enumerate(prompts):
            alone = model(**prompt).logits[0, -1]
            torch.testing.assert_close(together[i], alone, rtol=1e-9, atol=1e-9)
            grid = handle.trace.grids[0]
            ratio = keep if isinstance(keep, float) else keep / grid.patches
            scores = scores_by_hand(model, prompt["pixel_values"][0, : grid.views], score)
            assert got[i] == handle.trace.kept_patches() == by_hand(grid, scores, ratio)
            assert by_hand(grid, scores.flip(0), ratio) != got[i]


@pytest.mark.parametrize("size", [(40, 24), (20, 70), (48, 48), (24, 60), (30, 44)])
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.6, 20])
def test_a_fixed_count_is_the_same_choice_topped_up(size, keep):
    model = tiny.shared(dtype=F64, family="llava_next")
    prompt, kept = tiny.prompt(model, [4, "image", 3], [size], seed=size[0]), {}
    for name in ("globalcom2", "globalcom2_fixed"):
        with torch.no_grad(), vlmprune.patch(model, name, keep=keep) as handle:
            model(**prompt)
            grid, kept[name] = handle.trace.grids[0], handle.trace.kept_patches()
    count = keep if isinstance(keep, int) else int(keep * grid.patches + 1e-6)
    own, fixed = set(kept["globalcom2"]), set(kept["globalcom2_fixed"])
    assert len(fixed) == count
    assert own <= fixed or fixed <= own  # the one goes on where the other ends
    ratio, scores = count / grid.patches, scores_by_hand(model, prompt["pixel_values"][0, : grid.views], "cls")
    ratio = keep if isinstance(keep, float) else ratio
    assert kept["globalcom2_fixed"] == fixed_by_hand(grid, scores, ratio, count)


def test_a_fixed_count_adds_little():
    model, more = tiny.shared(dtype=F64, family="llava_next"), []
    for seed in range(12):
        prompt = tiny.prompt(model, [4, "image", 3], [(48, 48)], seed=seed)
        found = []
        for name in ("globalcom2", "globalcom2_fixed"):
            with torch.no_grad(), vlmprune.patch(model, name, keep=0.3) as handle:
                model(**prompt)
                found.append(set(handle.trace.kept_patches()))
        assert found[0] < found[1]
        more.append(len(found[1] - found[0]))
    assert max(more) < 5  # less than one for every view, which floors


@pytest.mark.parametrize("tau", [0.001, 0.1])
def test_tau_sharpens_the_crops_budgets(tau):
    model = tiny.shared(dtype=F64, family="llava_next")
    prompt = tiny.prompt(model, [4, "image", 3], [(40, 48)])
    with torch.no_grad(), vlmprune.patch(model, "globalcom2", keep=0.5, tau=tau) as handle:
        model(**prompt)
        grid, got = handle.trace.grids[0], handle.trace.kept_patches()
        scores = scores_by_hand(model, prompt["pixel_values"][0, : grid.views], "cls")
    assert got == by_hand(grid, scores, 0.5, tau)
    assert got != by_hand(grid, scores, 0.5, 10.0)


@pytest.mark.parametrize("keep", [1.0, 10_000])
@pytest.mark.parametrize("size", [(40, 24), (20, 70), (90, 1), (24, 48)])
def test_the_released_order_of_everything_is_the_image_as_it_is(size, keep):
    """Un-padded canvases too, which have fewer newlines than the released code writes."""
    model = tiny.shared(dtype=F64, family="llava_next")
    prompt = tiny.prompt(model, [4, "image", 5, "image", 2], [size, (24, 24)])
    with torch.no_grad():
        plain = model(**prompt).logits[0, -1]
        with vlmprune.patch(model, "globalcom2", keep=keep, parity="released", newlines="none") as handle:
            got = model(**prompt).logits[0, -1]
            assert handle.trace.kept() == list(range(handle.trace.grids[0].tokens))
    torch.testing.assert_close(got, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(24, 60), (60, 24)])
def test_released_order_reaches_the_language_model(size):
    """The released sequence is not ascending and has a newline for padded rows: compare what the LLM computes."""
    model = tiny.shared(dtype=F64, family="llava_next")
    prompt = tiny.prompt(model, [4, "image", 5], [size])
    with torch.no_grad():
        x, (image,) = reference.embed(model, prompt)
        with vlmprune.patch(model, "globalcom2", keep=0.5, parity="released") as handle:
            got = model(**prompt).logits[0, -1]
            trace = handle.trace
        grid = trace.grids[0]
        scores = scores_by_hand(model, prompt["pixel_values"][0, : grid.views], "cls")
        kept = by_hand(grid, scores, 0.5)
        thumbnail = sorted((t for t in kept if grid.view[t] == 0), key=lambda t: -float(scores[0, grid.source[t]]))
        (down, across), slots = grid.crops, {}
        for j in range(down * across):
            mine = [t for t in range(grid.tokens) if grid.view[t] == j + 1 and not grid.newline[t]]
            for place, t in enumerate(mine):
                if t in kept:
                    slots[(j // across) * 4 + place // 4, (j % across) * 4 + place % 4] = t
        newline = next(t for t in range(grid.tokens) if grid.newline[t])
        order = list(thumbnail)
        for row in range(down * 4):
            order += [slots[row, col] for col in range(across * 4) if (row, col) in slots]
            order.append(newline)
        columns = [*range(image[0]), *(image[t] for t in order), *range(image[-1] + 1, len(x))]
        out = model.model.language_model(inputs_embeds=x[columns][None]).last_hidden_state[0]
        ascending = sorted(columns)
        other = model.model.language_model(inputs_embeds=x[ascending][None]).last_hidden_state[0]
    torch.testing.assert_close(got, model.lm_head(out[-1]), rtol=1e-9, atol=1e-9)
    assert (got - model.lm_head(other[-1])).abs().max() > 1e-7
    assert trace.kept() == order
    assert trace.counts[0]["patches_after"] == len(kept)
    assert trace.counts[0]["newlines_after"] == down * 4
    assert order != sorted(set(order))
    assert trace.layer_average() == len(order)
    assert trace.kv_lengths == [len(columns)] * 4


def test_released_order_as_long_as_the_image():
    """Nothing gets shorter, and the order is still another one."""
    model = tiny.shared(dtype=F64, family="llava_next")
    prompt = tiny.prompt(model, [4, "image", 5], [(26, 44)])
    with torch.no_grad():
        plain = model(**prompt).logits[0, -1]
        tokens = int((prompt["input_ids"] == model.config.image_token_id).sum())
        for percent in range(990, 900, -2):
            with vlmprune.patch(model, "globalcom2", keep=percent / 1000, parity="released") as handle:
                try:
                    got = model(**prompt).logits[0, -1]
                except ValueError:  # longer than the image
                    continue
                if len(handle.trace.kept()) == tokens:
                    break
        else:
            pytest.fail("no budget gave as many tokens as the image has")
    assert (got - plain).abs().max() > 1e-7


def test_a_canvas_that_vanishes():
    model = tiny.shared(dtype=F64, family="llava_next")
    prompt = tiny.prompt(model, [4, "image", 5], [(90, 1)])
    with torch.no_grad(), vlmprune.patch(model, "globalcom2", keep=0.5, parity="released") as handle:
        assert model(**prompt).logits.isfinite().all()
    assert len(handle.trace.grids[0].planes) == 1  # the case is the one that is meant
    assert len(handle.trace.kept()) == 8


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_features_of_the_last_layer(tower):
    """`vision_feature_layer=-1`: what is measured lies behind the tower's last layer."""
    model = tiny.model("llava_next", tower=tower, seed=3).double()
    prompt = tiny.prompt(model, [4, "image", 5], [(40, 24)])
    kept = {}
    for layer in (-1, -2):
        model.config.vision_feature_layer = model.model.config.vision_feature_layer = layer
        with torch.no_grad(), vlmprune.patch(model, "globalcom2", keep=0.4, score="distinct") as handle:
            model(**prompt)
            pixels = prompt["pixel_values"][0, : handle.trace.grids[0].views]
            hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[layer]
            features = hidden[:, 1:] if tower == "clip" else hidden
            scores = -torch.cosine_similarity(features, features.mean(1, keepdim=True), dim=-1)
            kept[layer] = handle.trace.kept_patches()
            assert kept[layer] == by_hand(handle.trace.grids[0], scores, 0.4)
    assert kept[-1] != kept[-2]


def test_refusals():
    released, others = GlobalCom2(keep=0.5, parity="released"), (Random(keep=0.9), TransPrune(keep=0.5))
    for made in ([others[0], released], [released, others[1]]):
        with pytest.raises(UnsupportedError, match="order of its own"):
            vlmprune.patch(tiny.shared(family="llava_next"), made)
    with pytest.raises(UnsupportedError, match="single view"):
        vlmprune.patch(tiny.shared(), "globalcom2", keep=0.5)
    with pytest.raises(UnsupportedError, match="distinct"):
        vlmprune.patch(tiny.shared(family="llava_next", tower="siglip"), "globalcom2", keep=0.5)
    with pytest.raises(ValueError, match="tau"):
        vlmprune.patch(tiny.shared(family="llava_next"), "globalcom2", keep=0.5, tau=0.0)
