"""The reference cases of decoder methods (ToDRE, TransPrune), through the pure functions."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import probes
import pytest
import torch

from vlmprune.cost.flops import prefill_flops
from vlmprune.methods.fastv import FastV
from vlmprune.methods.todre import stage2_layer
from vlmprune.methods.transprune import TransPrune
from vlmprune.parts.attention import attention_mass, split_heads
from vlmprune.parts.cuts import schedule_layers
from vlmprune.parts.decoder_taps import transition
from vlmprune.parts.diversity import greedy_diversity

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens/decoder_methods.json").read_text())
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def close(actual, expected, dtype):
    expected = torch.tensor(expected, dtype=dtype)
    rtol = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol)


@DTYPES
def test_todre_cls_pivot(dtype):
    case = GOLDEN["todre"]["cls_pivot"]
    x = {k: torch.tensor(v, dtype=dtype) for k, v in case["inputs"].items()}
    query, key = (x["z_cls"] @ x["w_q"])[None, None], (x["z_vis"] @ x["w_k"])[None]
    for heads, name in ((1, "single_head_literal_eq3"), (2, "two_heads_mean")):
        dim = query.shape[-1] // heads
        row = attention_mass(split_heads(query, dim), split_heads(key, dim), dim**-0.5)[0]
        close(row, case["expected"][name]["attention"], dtype)
        assert int(row.argmax()) == case["expected"][name]["pivot"]


@DTYPES
@pytest.mark.parametrize(("objective", "name"), [("max_min", "v1_kcenter"), ("max_sum", "v2_maxsum")])
def test_todre_selection(objective, name, dtype):
    case = GOLDEN["todre"]["selection"]
    x = torch.tensor(case["inputs"]["x"], dtype=dtype)[None]
    first, k = torch.tensor([case["inputs"]["pivot"]]), case["inputs"]["k"]
    picked, order = greedy_diversity(x, first, [k], torch.ones(x.shape[:2], dtype=torch.bool), objective)
    assert order[0].tolist() == case["expected"][name]["order"]
    assert picked[0].nonzero().flatten().tolist() == case["expected"][name]["kept"]
    unit = torch.nn.functional.normalize(x[0], dim=-1)[order[0]]
    cosine = (unit @ unit.T).tril(-1)[1:]  # of every pick to those before it
    if objective == "max_sum":
        close(cosine.sum(1), case["expected"][name]["cumulative_cosine_when_picked"], dtype)
    else:
        near = (1 - cosine).masked_fill(cosine == 0, torch.inf).amin(1)
        close(near, case["expected"][name]["min_distance_when_picked"], dtype)


def test_diversity_of_a_batch_is_that_of_each_row():
    torch.manual_seed(0)
    x, counts, first = torch.randn(3, 20, 5), [4, 1, 9], torch.tensor([3, 0, 7])
    candidates = torch.rand(3, 20) > 0.2
    candidates[torch.arange(3), first] = True
    for objective in ("max_sum", "max_min"):
        picked, _ = greedy_diversity(x, first, counts, candidates, objective)
        assert picked.sum(1).tolist() == counts
        assert not (picked & ~candidates).any()
        for i in range(3):
            alone, _ = greedy_diversity(
                x[i : i + 1], first[i : i + 1], counts[i : i + 1], candidates[i : i + 1], objective
            )
            assert torch.equal(alone[0], picked[i])


def test_diversity_ties_go_to_the_lower_index():
    x = torch.eye(4)[[0, 1, 1, 2, 2]][None]
    for objective, expected in (("max_sum", [0, 1, 3]), ("max_min", [0, 1, 3])):
        picked, _ = greedy_diversity(x, torch.tensor([0]), [3], torch.ones(1, 5, dtype=torch.bool), objective)
        assert picked[0].nonzero().flatten().tolist() == expected


def test_todre_stage2_layer():
    for layers, expected in GOLDEN["todre"]["stage2_layer"]["expected"].items():
        assert stage2_layer(int(layers)) == expected


def test_todre_flops():
    case = GOLDEN["todre"]["flops"]
    n = case["inputs"]["n"]
    for size in ("7b", "13b"):
        layers, hidden, ffn = case["inputs"][size]
        assert prefill_flops([n] * layers, hidden, ffn, ffn_matrices=2) == case["expected"][f"prefill_{size}"]


@DTYPES
def test_transprune_transition(dtype):
    case = GOLDEN["transprune"]["ttv_one_module"]
    before, after = (torch.tensor(case["inputs"][k], dtype=dtype) for k in ("before", "after"))
    rows, expected = case["inputs"]["image_rows"], case["expected"]
    everything = torch.ones(len(before), dtype=torch.bool)
    official = transition(before, after, everything, "official")
    close(official, expected["ttv_official_all_rows"], dtype)
    # a softmax over one row is 1, and its logarithm over all rows is the direction up to a constant
    alone = [transition(before[i : i + 1], after[i : i + 1], everything[:1], "official") for i in range(len(before))]
    magnitude = torch.cat(alone)
    close(magnitude, expected["magnitude"], dtype)
    direction = (official / magnitude).log()
    close(expected["cosine"][0] + direction[0] - direction, expected["cosine"], dtype)
    image = torch.zeros_like(everything)
    image[rows] = True
    close(transition(before, after, image, "paper")[rows], expected["ttv_paper_image_rows"], dtype)


def per_layer(counts, prune, layers, tokens):
    """Tokens of every layer when `counts` are left after the 1-based layers `prune`."""
    edges = [0, *prune, layers]
    return [n for n, (a, b) in zip([tokens, *counts], pairwise(edges), strict=True) for _ in range(b - a)]


def test_transprune_schedule():
    case = GOLDEN["transprune"]["schedule"]
    given, expected = case["inputs"], case["expected"]
    layers, hidden, ffn, prune = given["n_layers"], given["hidden"], given["ffn"], given["prune_layers_1based"]
    method = TransPrune()
    assert list(method.prune_layers) == prune
    assert list(method.keep_ratios) == given["keep_ratio_of_original"]
    assert schedule_layers(method.prune_layers, layers) == prune
    counts = {n: [probes.left(method, n, stage) for stage in range(3)] for n in (576, 2880, 2343)}
    for n, left in counts.items():
        assert left == expected[f"keep_{n}"]
    assert per_layer(counts[576], prune, layers, 576) == expected["per_layer_576"]
    assert sum(expected["per_layer_576"]) / layers == expected["mean_tokens_576"]

    def tflops(tokens):
        return prefill_flops(tokens, hidden, ffn) / 1e12

    totals = expected["tflops"]
    for n in (576, 2880, 288, 192):
        assert tflops([n] * layers) == pytest.approx(totals[f"dense_{n}"], rel=1e-12)
    for n in (576, 2880):
        assert tflops(per_layer(counts[n], prune, layers, n)) == pytest.approx(totals[f"high_{n}"], rel=1e-12)
    for other in ((5, 7, 10), (6, 8, 11), (8, 10, 13), (9, 11, 14)):
        name = "high_576_layers_" + "_".join(map(str, other))
        assert tflops(per_layer(counts[576], other, layers, 576)) == pytest.approx(totals[name], rel=1e-12)
    for percent, keep in ((50, 0.5), (75, 0.25)):
        left = FastV(keep=keep).left(576, 2 / layers)
        assert tflops(per_layer([left], [2], layers, 576)) == pytest.approx(
            totals[f"fastv_k2_r{percent}_576"], rel=1e-12
        )
    halves = per_layer([288, 144, 72], [8, 16, 24], layers, 576)
    assert tflops(halves) == pytest.approx(totals["pdrop_576"], rel=1e-12)
    guesses = {
        "guess_low_576": (576, (0.625, 0.1875, 0.0625)),
        "guess_low_2880": (2880, (0.625, 0.1875, 0.0625)),
        "guess_with_visionzip_288": (288, (0.5, 0.25, 0.125)),
        "guess_with_visionzip_192": (192, (0.5, 0.25, 0.125)),
    }
    for name, (n, ratios) in guesses.items():
        left = [probes.left(TransPrune(keep_ratios=ratios), n, stage) for stage in range(3)]
        assert tflops(per_layer(left, prune, layers, n)) == pytest.approx(totals[name], rel=1e-12)


def test_average_solves_for_published_counts():
    assert [FastV(average=t).left(576, 2 / 32) for t in (192, 128, 64)] == [166, 98, 30]
    share = tuple((b - a) / 32 for a, b in pairwise([7, 9, 12, 32]))
    method = TransPrune(average=236)
    left = [probes.left(method, 576, stage, share) for stage in range(3)]
    assert sum(per_layer(left, [7, 9, 12], 32, 576)) / 32 == pytest.approx(236, abs=1.5)
