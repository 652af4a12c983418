"""VisPruner and FasterVLM beside the cases of the published code (test_goldens_baselines.py)."""

from __future__ import annotations

import pytest
import torch
from probes import hand_layout, kept, raster

from vlmprune.methods import FasterVLM, VisPruner
from vlmprune.parts import ModelFacts, VisionAttention, dedupe


def test_near_duplicates_go_first():
    angle = torch.tensor([0.0, 0.01, 1.0, 1.02, 2.0, 2.5])
    unit = torch.stack((angle.cos(), angle.sin()), 1)
    # even places 0, 2, 4 against odd ones 1, 3, 5: the twins 0-1 and 2-3 are alike most
    assert sorted(dedupe(unit, 4).tolist()) == [1, 3, 4, 5]
    assert sorted(dedupe(unit, 5, step=1).tolist()) == [1, 2, 3, 4, 5]
    assert dedupe(unit, 6).tolist() == list(range(6))


@pytest.mark.parametrize("tokens", range(1, 24))
def test_any_number_can_be_thinned_out(tokens):
    unit = torch.nn.functional.normalize(torch.randn(tokens, 3, generator=torch.Generator().manual_seed(tokens)), dim=1)
    for target in range(1, tokens + 1):
        assert len(set(dedupe(unit, target).tolist())) == target


def test_fastervlm_is_the_important_part_alone():
    g = torch.Generator().manual_seed(0)
    row, features, layout = (
        torch.rand(1, 36, generator=g),
        torch.randn(1, 36, 8, generator=g),
        hand_layout(raster(6, 6)),
    )
    best = sorted(row[0].topk(10).indices.tolist())
    assert kept(FasterVLM(keep=10).reduce({0: row}, layout)) == best
    assert kept(VisPruner(keep=10, important_ratio=1).reduce({0: row}, layout)) == best
    half = kept(VisPruner(keep=10).reduce({0: row, 1: features}, layout))
    assert set(row[0].topk(5).indices.tolist()) < set(half) != set(best)


@pytest.mark.parametrize("share", [-0.1, 1.5, "half"])
def test_bad_shares(share):
    with pytest.raises(ValueError, match=r"important_ratio=.* must be a number between 0 and 1"):
        VisPruner(keep=4, important_ratio=share)


def test_fastervlm_looks_at_one_row():
    facts = ModelFacts("llava", 24, 22, True, decoder_layers=32, views=False, view_patches=576)
    assert FasterVLM(keep=4).cuts(facts)[0].see == (VisionAttention(22),)
    assert len(VisPruner(keep=4).cuts(facts)[0].see) == 2
