"""Published reference cases, on pure functions without a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import probes
import pytest
import tiny
import torch

from vlmprune import UnsupportedError
from vlmprune.methods import FoPru, VtcCls
from vlmprune.parts.scores import ensemble_scores
from vlmprune.parts.selection import top_k
from vlmprune.parts.taps import VisionAttention
from vlmprune.patches import family_of

DATA = json.loads((Path(__file__).parents[1] / "goldens" / "encoder_methods.json").read_text())
CASES = {case["name"]: case for case in DATA["cases"]}
DTYPES = [torch.float32, torch.float64]


def of(method):
    return [pytest.param(case, id=name) for name, case in CASES.items() if case["method"] == method]


def facts(layers, has_cls=True):
    made = family_of(tiny.shared()).facts(tiny.shared().model)
    return replace(made, tower_layers=layers, feature_layer=layers - 2, has_cls=has_cls)


def close(got, want, dtype):
    want = torch.tensor(want, dtype=got.dtype)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-9)


class Given:
    """A tower layer with a given attention `(heads, tokens, tokens)`, whose input is one one-hot row per token."""

    scale = 1.0

    def __init__(self, attention):
        self.logits = attention.clamp(min=1e-30).log()

    def normed(self, hidden):
        return hidden

    def queries(self, rows):
        return rows[:, None] @ self.logits

    def keys(self, rows):
        return rows[:, None].expand(-1, len(self.logits), -1, -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", of("fopru"))
def test_fopru(case, dtype):
    params, expected = case["params"], case["expected"]
    attention = torch.tensor(case["inputs"]["attn"], dtype=dtype)
    method = FoPru(params["ratio"], strategy=params["strategy"], score=params["mode"])
    rows = "cls" if params["mode"] == "cls" else "patches"
    (cut,) = method.cuts(facts(6, params["has_cls"]))
    assert cut.see == (VisionAttention(4, rows),)
    every = torch.eye(attention.shape[-1], dtype=dtype)[None]
    (scores,) = cut.see[0].measure(Given(attention), every, params["has_cls"])
    close(scores, expected["scores"], torch.float32)  # rows are given to six digits, and the softmax mends their sum
    layout = probes.hand_layout(probes.raster(params["grid_h"], params["grid_w"]))
    reduction = cut.reduce({cut.see[0]: scores[None]}, layout)
    assert probes.kept(reduction) == expected["kept"]
    assert reduction.counts == [len(expected["kept"])]
    if "k" in expected:
        assert len(expected["kept"]) == expected["k"]
    if "kept_rows" in expected:
        cols = params["grid_w"]
        means = scores.view(params["grid_h"], cols).mean(1)
        close(means, expected["row_scores"], torch.float32)
        best = top_k(means[None], [expected["k_rows"]], torch.ones(1, len(means), dtype=torch.bool))
        assert best[0].nonzero().flatten().tolist() == expected["kept_rows"]
        assert {t // cols for t in probes.kept(reduction)} == set(expected["kept_rows"])
    # the other strategy on the same scores, in plain Python
    other = "row" if params["strategy"] == "rank" else "rank"
    reduction = replace(method, strategy=other).reduce({cut.see[0]: scores[None]}, layout)
    by_hand = {"rank": best_patches, "row": best_rows}
    rows, cols, ratio = params["grid_h"], params["grid_w"], params["ratio"]
    assert by_hand[params["strategy"]](scores.tolist(), rows, cols, ratio) == expected["kept"]
    assert by_hand[other](scores.tolist(), rows, cols, ratio) == probes.kept(reduction)


def best_patches(scores, rows, cols, ratio):
    order = sorted(range(rows * cols), key=lambda t: (-scores[t], t))
    return sorted(order[: max(1, int(rows * cols * ratio))])


def best_rows(scores, rows, cols, ratio):
    means = [sum(scores[r * cols : (r + 1) * cols]) / cols for r in range(rows)]
    order = sorted(range(rows), key=lambda r: (-means[r], r))[: max(1, int(rows * ratio))]
    return [r * cols + c for r in sorted(order) for c in range(cols)]


def test_fopru_strategies_differ():
    """Of the cases at least these two are such that the other strategy keeps other patches."""
    for name in ("fopru_rank_received_25", "fopru_row_received_50"):
        case = CASES[name]
        given = (case["expected"]["scores"], 4, 4, case["params"]["ratio"])
        assert best_patches(*given) != best_rows(*given)


def test_a_score_that_fopru_does_not_have():
    with pytest.raises(ValueError, match="score='bogus' is not one of 'received', 'cls'"):
        FoPru(4, score="bogus")
    with pytest.raises(UnsupportedError, match=r"\[CLS\] token, and this tower has none; use score='received'"):
        FoPru(4, score="cls").cuts(facts(6, has_cls=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", of("vtc_cls"))
def test_vtc_cls(case, dtype):
    params, expected, given = case["params"], case["expected"], case["inputs"]["attns"]
    maps = torch.tensor(DATA["shared"]["vtc_shared"] if given == "@vtc_shared" else given, dtype=dtype)
    maps = maps if maps.ndim == 4 else maps[:, 0]
    method = VtcCls(params["num_keep"], start_layer=params["start_layer"], ensemble=params["ensemble"])
    (cut,) = method.cuts(facts(len(maps)))
    assert [tap.layer for tap in cut.see] == expected["layers_used"]
    assert {tap.rows for tap in cut.see} == {"cls"}
    rows = {tap: maps[tap.layer].mean(0)[0, 1:][None] for tap in cut.see}
    close(ensemble_scores(list(rows.values()), params["ensemble"])[0], expected["scores"], dtype)
    patches = maps.shape[-1] - 1
    side = int(patches**0.5)
    layout = probes.hand_layout(probes.raster(side, patches // side))
    assert probes.kept(cut.reduce(rows, layout)) == expected["kept"]

    # the mistakes that the case knows lead elsewhere, and to where it says
    def choose(layers, heads, row):
        seen = {VisionAttention(i): row(heads(maps[i]))[None] for i in layers}
        return probes.kept(cut.reduce(seen, layout))

    used, every = expected["layers_used"], lambda m: m.mean(0)
    mistakes = {
        "last_layer_included": lambda: choose([*used, len(maps) - 1], every, lambda m: m[0, 1:]),
        "last_layer_only": lambda: choose([len(maps) - 1], every, lambda m: m[0, 1:]),
        "cls_column_not_dropped": lambda: choose(used, every, lambda m: m[0, :-1]),
        "cls_as_key_instead_of_query": lambda: choose(used, every, lambda m: m[1:, 0]),
        "first_head_only": lambda: choose(used, lambda m: m[0], lambda m: m[0, 1:]),
    }
    for name, wrong in expected.get("must_differ_from", {}).items():
        assert wrong != expected["kept"]
        if name != "cls_column_not_dropped":
            assert mistakes[name]() == wrong, name


def test_cases_are_there():
    """The files may gain cases; losing some would pass silently."""
    methods = [case["method"] for case in DATA["cases"]]
    assert (methods.count("fopru"), methods.count("vtc_cls")) >= (5, 3)
