"""Cases of methods that people compare with, made by their published implementations on made-up tensors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from probes import hand_layout, raster
from safetensors.torch import load_file

from vlmprune.methods import CDPruner, HiPrune, PruMerge, PruMergePlus, VisionZip, VisPruner
from vlmprune.methods.cdpruner import likeness, rescaled
from vlmprune.parts import Views
from vlmprune.parts.diversity import greedy_diversity, most_apart, weighted_det
from vlmprune.parts.merging import picked

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = json.loads((GOLDENS / "baselines.json").read_text())["cases"]
TENSORS = load_file(GOLDENS / "baselines.safetensors")


def cases(method: str) -> list:
    return [pytest.param(case, id=case["name"]) for case in CASES if case["method"] == method]


def tensor(case: dict, name: str) -> torch.Tensor:
    return TENSORS[f"{case['name']}.{name}"]


@pytest.mark.parametrize("case", cases("divprune"))
def test_divprune_picks_in_the_published_order(case):
    features, picks = tensor(case, "features"), tensor(case, "picks_in_order")
    everything = torch.ones(1, len(features), dtype=torch.bool)
    first = most_apart(features[None], everything)
    _, order = greedy_diversity(features[None], first, [len(picks)], everything, "max_min")
    assert order[0].tolist() == picks.tolist()


@pytest.mark.parametrize("case", cases("visionzip"))
def test_visionzip_makes_the_published_tokens(case):
    hidden, row, keys = (tensor(case, name) for name in ("hidden", "cls_attention", "keys"))
    row = row.sum(0) if row.ndim == 2 else row
    dominant, contextual = case["params"]["dominant"], case["params"]["contextual"]
    keep, side = dominant + contextual + 1, math.isqrt(len(row))
    pick = VisionZip(keep=keep, contextual=contextual / keep).merge(
        {0: row[None], 1: keys[None]}, Views([raster(side, side)])
    )
    assert {0, *(pick.keep[0].nonzero().flatten() + 1).tolist()} > set(tensor(case, "dominant_with_cls").tolist())
    made, want = picked(hidden[None], pick)[0, 1:][pick.keep[0]], tensor(case, "tokens")
    # the released code puts [CLS] first, then those that merge last
    at = torch.cdist(want.double(), made.double()).argmin(1)
    assert sorted(at.tolist()) == list(range(keep))
    assert at[1 : dominant + 1].tolist() == sorted(at[1 : dominant + 1].tolist())
    torch.testing.assert_close(made[at], want)
    assert torch.equal(made[at[: dominant + 1]], hidden[tensor(case, "dominant_with_cls").sort().values])


@pytest.mark.parametrize("case", cases("cdpruner"))
def test_cdpruner_keeps_the_published_patches(case):
    features, keep = tensor(case, "features"), case["params"]["keep"]
    relevance = -likeness(tensor(case, "image_embeds"), tensor(case, "text_embeds"))
    everything = torch.ones(features.shape[:2], dtype=torch.bool)
    # the released code rescales over all views of a batch
    weight = rescaled(relevance.flatten()[None], everything.flatten()[None]).view_as(relevance)
    order = weighted_det(features, weight, keep, everything)
    kept, want = everything.logical_not().scatter(1, order, True), tensor(case, "keep")
    if (dims := features.shape[-1]) < keep:
        # more picks than numbers: the released code's later ones are of rounding, then of NaN, and it keeps fewer
        assert kept.sum() == keep > want.sum()
        assert want.gather(1, order)[:, :dims].all()
    else:
        assert torch.equal(kept, want)
        if len(features) == 1:
            got = CDPruner(keep=keep).choose(features, relevance, hand_layout(raster(1, features.shape[1]))).keep
            assert torch.equal(got, want)


@pytest.mark.parametrize("case", [*cases("prumerge"), *cases("prumerge_plus")])
def test_prumerge_makes_the_published_tokens(case):
    query, key, hidden = (tensor(case, name) for name in ("query", "key", "hidden"))
    row = torch.softmax(query[0] @ key.T * query.shape[1] ** -0.5, -1)[1:]
    method = PruMergePlus() if case["method"] == "prumerge_plus" else PruMerge()
    pick = method.merge({0: row[None], 1: key[None, 1:]}, Views([raster(24, 24)]))
    made, want = picked(hidden[None], pick)[0, 1:][pick.keep[0]], tensor(case, "tokens")
    # the released code orders its tokens by attention
    assert made.shape == want.shape
    at = torch.cdist(want.double(), made.double()).argmin(1)
    assert sorted(at.tolist()) == list(range(len(made)))
    torch.testing.assert_close(made[at], want, rtol=1e-4, atol=1e-5)


def decided(method, values: list[torch.Tensor], layout) -> torch.Tensor:
    """What a method keeps of one picture, `(tokens,)` bool, from what its taps would say."""
    return method.reduce(dict(enumerate(value[None] for value in values)), layout).keep[0]


@pytest.mark.parametrize("case", cases("vispruner"))
def test_vispruner_keeps_the_published_patches(case):
    features, row = tensor(case, "features"), tensor(case, "cls_attention").mean(0)
    layout = hand_layout(raster(1, len(features)))
    got = decided(VisPruner(**case["params"]), [row, features], layout)
    assert torch.equal(got, tensor(case, "keep"))


@pytest.mark.parametrize("case", cases("hiprune"))
def test_hiprune_keeps_the_published_patches(case):
    keep, side = case["params"]["keep"], case["params"]["grid"]
    method = HiPrune(keep=keep, alpha=case["params"]["alpha"], parity="released")
    got = decided(
        method, [tensor(case, "shallow_received"), tensor(case, "deep_received")], hand_layout(raster(side, side))
    )
    assert torch.equal(got, tensor(case, "keep"))
