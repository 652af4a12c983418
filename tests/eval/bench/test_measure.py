"""One cell: what is measured, how often, and the sums behind the bounds; intervals and medians."""

from __future__ import annotations

import pytest
import torch
from leftovers import ours

import vlmprune
from vlmprune.eval.bench import measure
from vlmprune.eval.bench.measure import Effort, amdahl, measure_method, measure_unpruned
from vlmprune.eval.bench.oracle import Oracle, Plain
from vlmprune.eval.bench.stats import median_interval, ratio, spread

EFFORT = Effort(pairs=6, plain=2, stages=1, new_tokens=8)


@pytest.fixture
def cell(work):
    def run(method="fopru", effort=EFFORT, batch=1, family="llava", **options):
        here = work(batch, family=family)
        base = measure_unpruned(here, effort)
        return here, base, measure_method(here, vlmprune.patch(here.model, method, **options), base, effort)

    return run


def test_a_cell(cell):
    here, base, found = cell(keep=4, batch=2)
    assert not ours(here.model)
    assert found["tokens"] == {"visual": 16, "entering": 4, "layer_average": 4, "kv_lengths": [11] * 4}
    assert found["stretches"] == [{"first_layer": 0, "layers": 4, "columns": 11}]
    assert found["same_as_oracle"] < 1e-5
    assert {who: times["runs"] for who, times in found["first_token_ms"].items()} == {
        "unpruned": 2,
        "pruned": 6,
        "oracle": 6,
    }
    assert found["overhead"]["pairs"] == 6
    assert found["speedup"]["pairs"] == found["oracle_speedup"]["pairs"] == 2
    assert found["decode_overhead"]["pairs"] == 6  # 7 steps, the first of which warms up
    assert found["kv_bytes"] / base["kv_bytes"] == 11 / 23
    assert found["flops"]["counted"] < base["flops"]["counted"]


def test_deep_cuts(cell):
    _, base, found = cell("fastv", keep=4)
    assert [part["columns"] for part in found["stretches"]] == [23, 11]
    assert len(found["stages_ms"]["prefill"]) == 2
    assert found["tokens"]["layer_average"] == 10
    assert 1 < found["amdahl"]["bound"] < found["amdahl"]["limit"]
    assert base["tokens"] == {"visual": 16, "patches": 16, "prompt": 23}


def test_methods_that_merge_have_no_equal_oracle(cell):
    assert cell("pool", keep=4)[2]["same_as_oracle"] is None
    assert cell("tome", keep=4)[2]["same_as_oracle"] is None


def test_one_new_token_is_no_decoding(cell):
    assert "decode_ms" not in cell(effort=Effort(2, 1, 1, new_tokens=1), keep=4)[2]


def test_only_the_pruned_runs_are_patched(cell, monkeypatch):
    ran = {"pruned": 0, "unpruned": 0, "oracle": 0}
    plain, oracle = Plain.prefill, Oracle.prefill

    def watched(self):
        ran["pruned" if ours(self.work.model) else "unpruned"] += 1
        return plain(self)

    def watched_oracle(self):
        assert not ours(self.work.model)
        ran["oracle"] += 1
        return oracle(self)

    steps = []
    step = Plain.step
    monkeypatch.setattr(Plain, "prefill", watched)
    monkeypatch.setattr(Oracle, "prefill", watched_oracle)
    monkeypatch.setattr(Plain, "step", lambda self, *a: steps.append(bool(ours(self.work.model))) or step(self, *a))
    cell(keep=4)
    # counting 1 + pairs 6 + stages 1; counting 1 + stages 1 + beside pairs 2; first try 1 + pairs 6
    assert ran == {"pruned": 8, "unpruned": 4, "oracle": 7}
    assert steps.count(True) == steps.count(False) == 7  # the oracle has a step of its own


def test_the_order_of_a_pair_alternates(cell, monkeypatch):
    order = []
    plain, oracle = Plain.prefill, Oracle.prefill
    monkeypatch.setattr(Plain, "prefill", lambda self: order.append(bool(ours(self.work.model))) or plain(self))
    monkeypatch.setattr(Oracle, "prefill", lambda self: order.append("oracle") or oracle(self))
    cell(effort=Effort(4, 1, 1, 1), keep=4)
    # counting and stages of the unpruned model, counting and first try of the pruned one
    assert order[:4] == [False, False, True, "oracle"]
    pairs = [who for who in order[4:] if who is not False]
    assert pairs == [True, "oracle", "oracle", True, True, "oracle", "oracle", True, True]


def test_a_method_that_raises_leaves_the_model_unpatched(work):
    here = work()
    handle = vlmprune.patch(here.model, "random", keep=4)
    object.__setattr__(handle._plan.cuts[0][1], "reduce", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure_method(here, handle, {}, EFFORT)
    assert not ours(here.model)


@pytest.mark.parametrize(("pairs", "times", "when"), [(15, 3, [4, 9, 14]), (5, 1, [4]), (4, 4, [0, 1, 2, 3])])
def test_runs_are_spread_evenly(pairs, times, when):
    assert [i for i in range(pairs) if Effort(pairs).due(i, times)] == when


def test_what_pruning_costs_is_compared_with_the_nearest_unpruned_run(cell, monkeypatch):
    times = iter([10.0, 1000.0])
    real = measure.Contender.prefill

    def prefill(self):
        token = real(self)
        if self.plan is None and not isinstance(self.run, Oracle):
            self.first[-1] = next(times)
        return token

    fixed = {
        "taps": 1.0,
        "selection": 2.0,
        "gather": 7.0,
        "tower": 0.0,
        "projector": 0.0,
        "prefill": [0.0],
        "rest": 0.0,
    }
    monkeypatch.setattr(measure.Contender, "prefill", prefill)
    monkeypatch.setattr(measure, "stage_seconds", lambda *_: fixed | {"total": 10.0})
    monkeypatch.setattr(measure, "amdahl", lambda *_: {})
    found = cell(effort=Effort(4, 2, 2, 1), keep=4)[2]
    assert (found["cost_share"]["low"], found["cost_share"]["high"]) == (0.01, 1.0)


def test_amdahl_by_hand(work, monkeypatch):
    monkeypatch.setattr(measure, "language_flops", lambda work, tokens: sum(tokens))
    stages = {"total": {"median": 10.0}, "prefill": [{"median": 8.0}]}
    found = amdahl(work(), stages, [23, 23, 0, 0])
    assert found == {"bound": 10 / (10 - 8 / 2), "limit": 10 / 2}


@pytest.mark.parametrize(("n", "rank"), [(3, 1), (5, 1), (6, 1), (9, 2), (15, 4), (25, 8)])
def test_intervals_of_medians(n, rank):
    # ranks of the published tables for 95 %
    assert median_interval([float(i) for i in range(1, n + 1)][::-1]) == (rank, n + 1 - rank)


def test_the_interval_covers_the_median_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    samples = torch.rand(2000, 15, generator=generator).tolist()
    hits = sum(low <= 0.5 <= high for low, high in map(median_interval, samples))
    assert 0.95 <= hits / len(samples) <= 0.98


def test_ratios_are_paired():
    assert ratio([2, 8, 3], [1, 2, 3]) == {"median": 2, "low": 1, "high": 4, "pairs": 3}
    assert spread([0.003, 0.001, 0.002]) == {"median": 2, "low": 1.5, "high": 2.5, "runs": 3}
    assert spread([0.25]) == {"median": 250, "low": 250, "high": 250, "runs": 1}
