"""GlobalCom² against the reference cases, through its pure functions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch

from vlmprune.methods.globalcom2 import GlobalCom2, crop_ratios, released_order
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

    method = GlobalCom2(keep=float(params["ratio"]), tau=params["tau"])
    kept, values = method.choose(scores, grid)
    assert sorted(grid.source[kept & (grid.view == 0)].tolist()) == sorted(expected["thumb_kept"])
    patches = grid.side[0] * grid.side[1]
    for crop, true in enumerate(expected["crops_kept"]):
        mine = kept & (grid.view == crop + 1) & ~grid.newline
        assert (grid.source[mine] % patches).tolist() == sorted(true)
        assert int(mine.sum()) == expected["k_per_crop"][crop]

    spatial = (kept | grid.newline).nonzero().flatten()
    assert names(spatial, grid) == expected["sequence_spatial"]
    released = released_order(kept & ~grid.newline, values, grid)
    assert names(released, grid) == expected["sequence_released"]
    assert len(released) == expected["len_released"]


def test_cases_were_found():
    assert len(CASES) >= 2
