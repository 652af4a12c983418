"""Cases of methods that people compare with, made by their published implementations on made-up tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlmprune.parts.diversity import greedy_diversity, most_apart

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
