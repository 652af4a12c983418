"""PruneSID: groups, suppression, and how many every group gets."""

from __future__ import annotations

import pytest
import torch
from probes import hand_layout, kept, raster

from vlmprune import spec
from vlmprune.methods import PruneSID
from vlmprune.methods.prunesid import allotted
from vlmprune.parts import principal_groups, survivors


@pytest.mark.parametrize("dim", [12, 80])  # more tokens than numbers, and fewer
def test_groups_are_of_the_principal_direction_on_which_a_token_weighs_most(dim):
    x = torch.randn(40, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.sigmoid(x).T
    loading = torch.linalg.svd(y - y.mean(0), full_matrices=False).Vh[:6].T
    assert principal_groups(x, 6).tolist() == loading.abs().argmax(1).tolist()
    assert principal_groups(x, 6).tolist() != principal_groups(x.flip(0), 6).tolist()


def test_what_is_too_much_like_a_better_one_is_suppressed():
    g = torch.Generator().manual_seed(1)
    unit = torch.nn.functional.normalize(torch.randn(60, 3, generator=g), dim=1)
    group, cosine = torch.randint(4, (60,), generator=g), unit @ unit.T
    want = []
    for token in range(60):
        if not any(group[t] == group[token] and cosine[t, token] > 0.4 for t in want):
            want.append(token)
    assert survivors(group, cosine, torch.tensor(0.4)).nonzero().flatten().tolist() == want
    assert survivors(group, cosine, torch.tensor(2.0)).all()


@pytest.mark.parametrize("keep", [1, 2, 5, 9, 20, 38, 40])
def test_allotments_add_up(keep):
    sizes, survive = [17, 1, 0, 12, 10], [6, 1, 0, 2, 10]
    part = allotted(survive, sizes, keep)
    assert sum(part) == min(keep, 40)
    assert all(0 <= p <= s for p, s in zip(part, sizes, strict=True))
    assert keep < 4 or part[1] == 1  # every group that has any gets one


def test_large_groups_are_capped():
    assert allotted([30, 3, 3], [40, 3, 3], 11) == [5, 3, 3]
    assert allotted([30, 3, 3], [40, 3, 3], 20) == [14, 3, 3]  # the cap is raised until there are enough


def test_a_picture_keeps_the_same_tokens_always():
    g, layout = torch.Generator().manual_seed(2), hand_layout(raster(6, 6))
    seen = {0: torch.randn(1, 36, 9, generator=g), 1: torch.rand(1, 36, generator=g)}
    first = kept(PruneSID(keep=12).reduce(seen, layout))
    torch.manual_seed(7)
    assert kept(PruneSID(keep=12).reduce(seen, layout)) == first
    assert len(first) == 12
    with pytest.raises(ValueError, match="draws random numbers"):
        spec.build("prunesid", {"keep": 12, "parity": "released"})
