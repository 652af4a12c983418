"""PruMerge between tower and projector, beside the cases of the published code (test_goldens_baselines.py)."""

from __future__ import annotations

import pytest
import tiny
import torch
from probes import raster

import vlmprune
from vlmprune import UnsupportedError
from vlmprune.methods import PruMerge, PruMergePlus
from vlmprune.parts import Views, outlying


def by_hand(model, pixels, keep, neighbours):
    """`(keep, dim)` projected tokens of one image in the order of their places, written with loops."""
    inner = model.model
    tower, layer = inner.vision_tower, inner.vision_tower.encoder.layers[-1]
    states = tower(pixels, output_hidden_states=True).hidden_states
    features, normed = states[-2][0], layer.layer_norm1(states[-2])[0]
    query, key = layer.self_attn.q_proj(normed), layer.self_attn.k_proj(normed)
    row = torch.softmax(query[0] @ key.T / key.shape[1] ** 0.5, -1)[1:]
    unit, patches = torch.nn.functional.normalize(key[1:], dim=-1), features[1:]
    strong = row.argsort(descending=True)[: keep - 1].tolist()
    made = {}
    for p in strong:
        others = sorted((q for q in range(len(row)) if q != p), key=lambda q: -float(unit[p] @ unit[q]))
        made[p] = patches[p] + sum(row[q] * patches[q] for q in others[:neighbours])
    rest = [p for p in range(len(row)) if p not in strong]
    made[rest[0]] = sum(row[p] * patches[p] for p in rest)
    return inner.multi_modal_projector(torch.stack([made[p] for p in sorted(made)])[None])[0]


@pytest.mark.parametrize(("keep", "neighbours"), [(6, 4), (9, 32), (1, 2)])
def test_its_anchors_are_what_they_are_by_hand(keep, neighbours):
    model = tiny.model(dtype=torch.float64)
    prompt = tiny.prompt(model, [7, "image", 9], [None])
    with torch.no_grad():
        want = by_hand(model, prompt["pixel_values"], keep, neighbours)
        with vlmprune.patch(model, PruMerge(keep=keep, neighbours=neighbours)) as handle:
            model(**prompt)
            features = model.model.get_image_features(prompt["pixel_values"], return_dict=True).pooler_output[0]
    torch.testing.assert_close(features[handle.trace.kept(0)], want, rtol=1e-6, atol=1e-6)


def test_the_picture_says_how_many():
    row = torch.full((1, 36), 0.01)
    row[0, [3, 17, 30]] = torch.tensor([0.3, 0.2, 0.1])
    assert (outlying(row) > 0)[0].nonzero().flatten().tolist() == [3, 17, 30]
    keys, views = torch.randn(1, 36, 8, generator=torch.Generator().manual_seed(0)), Views([raster(6, 6)])
    kept = PruMerge().merge({0: row, 1: keys}, views).keep[0]
    assert kept.nonzero().flatten().tolist() == [0, 3, 17, 30]  # the first place is that of the rest
    plus = PruMergePlus().merge({0: row, 1: keys}, views).keep[0]
    assert plus.nonzero().flatten().tolist() == sorted({*range(0, 35, 4), 3, 17, 30, 1})
    none = PruMergePlus().merge({0: row * 0 + 0.1, 1: keys}, views)
    assert none.keep[0].nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize("keep", range(1, 37))
@pytest.mark.parametrize("method", [PruMerge, PruMergePlus])
def test_a_budget_is_met(method, keep):
    g = torch.Generator().manual_seed(keep)
    seen = {0: torch.rand(1, 36, generator=g), 1: torch.randn(1, 36, 8, generator=g)}
    pick = method(keep=keep).merge(seen, Views([raster(6, 6)]))
    assert int(pick.keep.sum()) == keep
    assert torch.equal(pick.mix[0], torch.eye(36)) == (keep == 36)


def test_without_a_budget_counts_are_read_from_the_picture():
    model = tiny.shared(dtype=torch.float64)
    prompt = tiny.prompt(model, [7, "image", 9], [None])
    with torch.no_grad(), vlmprune.patch(model, "prumerge") as handle:
        model(**prompt)
    assert 1 <= len(handle.trace.kept_patches(0)) < 16
    with pytest.raises(UnsupportedError, match="take one of the two"):
        vlmprune.patch(tiny.model(), [PruMerge(), vlmprune.methods.VisionZip(keep=4)])
