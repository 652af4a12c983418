"""GlobalCom² against the reference cases, through its pure functions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch

from vlmprune.methods.globalcom2 import GlobalCom2, crop_ratios, released_order, stretch
from vlmprune.parts.attention import cls_logits, distinctness
from vlmprune.parts.selection import top_k
from vlmprune.patches import FAMILIES

CASES = [
    case
    for case in json.loads((Path(__file__).parents[1] / "goldens/encoder_methods.json").read_text())["cases"]
    if case["method"] == "globalcom2"
]


@pytest.fixture(scope="module")
def inner():
    return tiny.model("llava_next").model


def grid_of(inner, params):
    """The layout of the case's image: its grid of crops is the only one the model may choose."""
    inner.config.image_grid_pinpoints = [[params["grid_h"] * tiny.TILE, params["grid_w"] * tiny.TILE]]
    return FAMILIES["llava_next"].image_grid(inner, (params["orig_h"], params["orig_w"]))


def names(order, grid):
    """Token numbers in the words of the reference: T<patch>, C<crop>.<patch>, NL."""
    patches = grid.side[0] * grid.side[1]
    return [
        "NL"
        if grid.newline[t]
        else f"T{grid.source[t]}"
        if grid.view[t] == 0
        else f"C{grid.view[t] - 1}.{grid.source[t] % patches}"
        for t in order
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden(inner, case, dtype):
    params, expected = case["params"], case["expected"]
    grid = grid_of(inner, params)
    thumb = torch.tensor(case["inputs"]["thumb_cls_scores_per_head"], dtype=dtype).mean(0)
    crops = torch.tensor(case["inputs"]["crop_cls_scores_per_head"], dtype=dtype).mean(1)
    scores = torch.cat((thumb[None], crops)).flatten()[grid.source]

    ratios = crop_ratios(thumb.view(grid.side), grid.crops, params["ratio"], params["tau"])
    torch.testing.assert_close(
        ratios,
        torch.tensor(expected["crop_ratio"], dtype=torch.float64),
        atol=1e-5,
        rtol=1e-5 if dtype.itemsize == 4 else 1e-9,
    )
    assert grid.patches_per_view[1:] == expected["valid_per_crop"]
    # what is inside: with a ratio so low that nothing is clipped, each ratio states its share, and each share its mass
    low = crop_ratios(thumb.view(grid.side), grid.crops, 0.1, params["tau"])
    share = low / 0.1 - 1 + 1 / len(low)
    exact = {"rtol": 0, "atol": 1e-5 if dtype.itemsize == 4 else 1e-7}
    torch.testing.assert_close(share, torch.tensor(expected["crop_sigma"], dtype=torch.float64), **exact)
    mass, told = params["tau"] * share.log(), torch.tensor(expected["crop_mass"], dtype=torch.float64)
    torch.testing.assert_close(mass - mass[0], told - told[0], rtol=1e-4, atol=1e-4)

    method = GlobalCom2(keep=float(params["ratio"]), tau=params["tau"])
    kept, values = method.choose(scores, grid)
    assert sorted(grid.source[kept & (grid.view == 0)].tolist()) == sorted(expected["thumb_kept"])
    assert int((kept & (grid.view == 0)).sum()) == expected["k_thumb"]
    patches = grid.side[0] * grid.side[1]
    for crop, true in enumerate(expected["crops_kept"]):
        member = (grid.view == crop + 1) & ~grid.newline
        mine = kept & member
        assert (grid.source[mine] % patches).tolist() == sorted(true)
        assert int(mine.sum()) == expected["k_per_crop"][crop]
        assert kept[member].nonzero().flatten().tolist() == sorted(expected["crops_kept_compact"][crop])
        combined = torch.tensor(expected["combined_scores"][crop], dtype=dtype)
        torch.testing.assert_close(values[member], combined, rtol=0, atol=1e-5 if dtype.itemsize == 4 else 1e-9)

    spatial = (kept | grid.newline).nonzero().flatten()
    assert names(spatial, grid) == expected["sequence_spatial"]
    assert len(spatial) == expected["len_spatial"]
    released = released_order(kept & ~grid.newline, values, grid)
    assert names(released, grid) == expected["sequence_released"]
    assert len(released) == expected["len_released"]
    by_score = names(released, grid)[: expected["k_thumb"]]
    assert by_score == [f"T{t}" for t in expected["thumb_kept_by_score"]]


def test_cases_were_found():
    assert len(CASES) >= 2


def helper_case(name):
    cases = json.loads((Path(__file__).parents[1] / "goldens/encoder_methods.json").read_text())["cases"]
    return next(case for case in cases if case["name"] == name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_from_query_and_keys(dtype):
    case = helper_case("gc2_scores_from_qk")
    query, key = (torch.tensor(case["inputs"][k], dtype=dtype) for k in ("q_cls", "k_patches"))
    scores = cls_logits(query, key, case["params"]["scale"])
    torch.testing.assert_close(scores, torch.tensor(case["expected"]["scores"], dtype=dtype), rtol=1e-5, atol=1e-6)
    kept = top_k(scores, 4, torch.ones_like(scores, dtype=torch.bool)).nonzero().flatten().tolist()
    assert kept == sorted(case["expected"]["top4"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_without_cls(dtype):
    case = helper_case("gc2_no_cls_scores")
    scores = distinctness(torch.tensor(case["inputs"]["tokens"], dtype=dtype))
    torch.testing.assert_close(scores, torch.tensor(case["expected"]["scores"], dtype=dtype), rtol=1e-5, atol=1e-6)
    kept = top_k(scores, 4, torch.ones_like(scores, dtype=torch.bool)).nonzero().flatten().tolist()
    assert kept == sorted(case["expected"]["top4"])


def test_guide_is_bilinear():
    case = helper_case("gc2_bilinear_4x4_to_6x8")
    grid = torch.tensor(case["inputs"]["grid"], dtype=torch.float64)
    out = stretch(grid, (case["params"]["out_h"], case["params"]["out_w"]))
    torch.testing.assert_close(out, torch.tensor(case["expected"]["out"], dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_unpad_boxes():
    """The original code rounds down, transformers rounds at the seventh digit: the layout follows the host."""
    case = helper_case("gc2_unpad_boxes")
    inner = tiny.model("llava_next").model
    inner.config.vision_config.image_size, inner.config.vision_config.patch_size = 24, 1
    for (width, height, across, down), box in zip(case["params"]["items"], case["expected"]["boxes"], strict=True):
        inner.config.image_grid_pinpoints = [[down, across]]
        grid = FAMILIES["llava_next"].image_grid(inner, (height, width))
        crop = (grid.view > 0) & ~grid.newline
        tile, number = grid.source[crop] % (24 * 24), grid.view[crop] - 1
        y = (number // (across // 24)) * 24 + tile // 24
        x = (number % (across // 24)) * 24 + tile % 24
        assert [int(y.min()), int(y.max()) + 1, int(x.min()), int(x.max()) + 1] == box
