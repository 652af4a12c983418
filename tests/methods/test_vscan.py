"""VScan: two scans, what is merged, and what its budgets mean."""

from __future__ import annotations

import pytest
import tiny
import torch
from probes import hand_layout, kept, raster

import vlmprune
from vlmprune.methods import VScan
from vlmprune.methods.vscan import two_scans
from vlmprune.parts import nearest_mean

LAYOUT = hand_layout(raster(8, 8))


def scans(keep, parity=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    shallow, deep = torch.rand(1, 64, generator=g), torch.rand(1, 64, generator=g)
    seen = {0: torch.randn(1, 64, 5, generator=g), 1: shallow, 2: deep}
    return VScan(keep=keep, layer=None, parity=parity).scan(seen, LAYOUT, early=0.0), shallow[0], deep[0]


def test_half_comes_from_windows_and_the_rest_from_everywhere():
    reduction, shallow, deep = scans(38)  # 19 local ones: one of every window, and of the best three one more
    windows = [[(2 * r + i) * 8 + 2 * c + j for i in (0, 1) for j in (0, 1)] for r in range(4) for c in range(4)]
    ranked = [sorted(window, key=lambda p: -float(shallow[p])) for window in windows]
    more = sorted(range(16), key=lambda w: -float(shallow[ranked[w][0]]))[:3]
    local = {ranked[w][0] for w in range(16)} | {ranked[w][1] for w in more}
    rest = sorted(set(range(64)) - local, key=lambda p: -float(deep[p]))[:19]
    assert kept(reduction) == sorted(local | set(rest))


@pytest.mark.parametrize("keep", [1, 5, 31, 32, 40, 58, 64])
def test_it_keeps_as_many_as_asked_and_the_released_code_fewer(keep):
    assert len(kept(scans(keep)[0])) == keep
    released = scans(keep, parity="released")[0]
    half = keep // 2
    assert len(kept(released)) == min(half // 16 * 16 + keep - half, 64)
    assert released.counts is None


def test_what_goes_is_averaged_into_its_nearest():
    features = torch.tensor([[[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 0.9], [0.2, 1.0]]])
    keep = torch.tensor([[True, False, True, False, False]])
    merge = nearest_mean(features, keep, torch.ones(1, 5, dtype=torch.bool))
    assert merge.into.tolist() == [[0, 0, 2, 2, 2]]
    torch.testing.assert_close(merge.weight, torch.tensor([[1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3]]))
    window = torch.zeros(1, 5, dtype=torch.long)
    one = two_scans(features[..., 0], features[..., 1], torch.ones(1, 1, 5).bool(), window, torch.tensor([[1]]))
    assert one.tolist() == [[False, False, True, False, False]]


@pytest.mark.parametrize(("given", "enters", "left"), [
    ({"keep": 32}, 96, 32), ({"keep": 0.25}, 432, 144), ({"keep": 300}, 576, 300), ({"average": 64}, 96, 32),
    ({"average": 192}, 288, 96), ({"average": 500}, 576, 424), ({"average": 1.0}, 576, 576),
])  # fmt: skip
def test_budgets(given, enters, left):
    assert VScan(**given).budgets(576, early=0.5) == (enters, left)


def test_the_layer_average_is_what_was_asked(tiny_model):
    model = tiny_model()
    prompt = tiny.prompt(model, [3, "image", 4], [None])
    with torch.no_grad(), vlmprune.patch(model, "vscan", average=4) as handle:
        model(**prompt)
        visual = [length - 7 for length in handle.trace.kv_lengths]
    assert visual == [6, 6, 2, 2]


@pytest.mark.parametrize("layer", [0, 32, "16", True])
def test_bad_layers(layer):
    with pytest.raises(ValueError, match=r"layer=.* must be a layer from 1 to 31"):
        VScan(keep=4, layer=layer)
