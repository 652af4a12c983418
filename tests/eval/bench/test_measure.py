"""One cell: what is measured, how often, and the sums behind the bounds; intervals and medians."""

from __future__ import annotations

import statistics

import pytest
import torch
from clocks import FakeClock
from leftovers import ours

import vlmprune
from vlmprune.cost.flops import formula_flops
from vlmprune.eval.bench import measure
from vlmprune.eval.bench.clock import Clock
from vlmprune.eval.bench.measure import Effort, amdahl, measure_method, measure_unpruned
from vlmprune.eval.bench.oracle import Oracle, PlainRun
from vlmprune.eval.bench.stats import median_interval, ratio, spread
from vlmprune.trace import Trace

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


@pytest.mark.parametrize("method", ["pool", "tome", "visionzip", "downsample"])
def test_methods_that_merge_or_change_the_picture_have_no_equal_oracle(cell, method):
    assert cell(method, keep=4)[2]["same_as_oracle"] is None


def test_one_new_token_is_no_decoding(cell):
    assert "decode_ms" not in cell(effort=Effort(2, 1, 1, new_tokens=1), keep=4)[2]


def test_only_the_pruned_runs_are_patched(cell, monkeypatch):
    ran = {"pruned": 0, "unpruned": 0, "oracle": 0}
    plain, oracle = PlainRun.prefill, Oracle.prefill

    def watched(self):
        ran["pruned" if ours(self.work.model) else "unpruned"] += 1
        return plain(self)

    def watched_oracle(self):
        assert not ours(self.work.model)
        ran["oracle"] += 1
        return oracle(self)

    steps = []
    step = PlainRun.step
    monkeypatch.setattr(PlainRun, "prefill", watched)
    monkeypatch.setattr(Oracle, "prefill", watched_oracle)
    monkeypatch.setattr(PlainRun, "step", lambda self, *a: steps.append(bool(ours(self.work.model))) or step(self, *a))
    cell(keep=4)
    # counting 1 + pairs 6 + stages 1; counting 1 + stages 1 + beside pairs 2; first try 1 + pairs 6
    assert ran == {"pruned": 8, "unpruned": 4, "oracle": 7}
    assert steps.count(True) == steps.count(False) == 7  # the oracle has a step of its own


def test_the_order_of_a_pair_alternates(cell, monkeypatch):
    order = []
    plain, oracle = PlainRun.prefill, Oracle.prefill
    monkeypatch.setattr(PlainRun, "prefill", lambda self: order.append(bool(ours(self.work.model))) or plain(self))
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
    monkeypatch.setattr(measure, "language_flops", lambda config, tokens: sum(tokens))
    stages = {"total": {"median": 10.0}, "prefill": [{"median": 8.0}]}
    found = amdahl(work(), stages, [23, 0, 0, 0])
    assert found == {"bound": 10 / (2 + 8 / 4), "limit": 10 / 2}
    stages["prefill"] = [{"median": 5.0}, {"median": 3.0}]
    assert amdahl(work(), stages, [23, 23, 23, 0]) == {"bound": 10 / (2 + 8 * 3 / 4), "limit": 10 / 2}


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


# What a cell says, from times that a script gives: every number of it by hand.

#: Seconds of first tokens, one per pair; before them, what is run and must not be counted.
FIRST = {"pruned": [999, 3, 5, 7, 11], "oracle": [888, 2, 13, 17, 19], "unpruned": [30, 70]}
#: Seconds of decode steps, four per answer (beside pairs 1 and 3); the first of four warms up.
STEP = {
    "pruned": [777, 2, 3, 5, 666, 7, 11, 13],
    "oracle": [555, 1, 4, 6, 444, 8, 9, 10],
    "unpruned": [333, 40, 60, 80, 222, 90, 110, 160],
}


#: Stages of the unpruned model, and of a pruned one with two stretches.
STAGES = {"taps": 0.0, "selection": 0.0, "gather": 0.0, "tower": 0.5, "projector": 0.25, "prefill": [1.0], "rest": 0.25,
          "total": 2.0}  # fmt: skip
PRUNED = {"taps": 1.0, "selection": 2.0, "gather": 3.0, "tower": 50.0, "projector": 60.0, "prefill": [70.0, 80.0],
          "rest": 90.0, "total": 356.0}  # fmt: skip


@pytest.fixture
def scripted(cell, monkeypatch):
    """A cell of a fake clock: FastV on two rows, four pairs, two answers of five tokens."""
    time = FakeClock()
    first, step = ({who: iter(times) for who, times in script.items()} for script in (FIRST, STEP))
    counting, scale = [], iter((1, 10))  # the second pruned run takes ten times as long as the first

    def who(run):
        return "oracle" if isinstance(run, Oracle) else "pruned" if ours(run.work.model) else "unpruned"

    def slow(cls, name, script):
        real = getattr(cls, name)

        def slowed(self, *args):
            if not counting and cls is (Oracle if isinstance(self, Oracle) else PlainRun):
                time.sleep(next(script[who(self)]))
            return real(self, *args)

        monkeypatch.setattr(cls, name, slowed)

    for cls in (PlainRun, Oracle):
        slow(cls, "prefill", first)
        slow(cls, "step", step)

    def count(work, prefill):
        pruned = who(prefill.__self__) == "pruned"
        if not pruned:  # the unpruned model's own figures; its times are those beside the pairs
            counting.append(1)
        prefill()
        counting.clear()
        return {"flops": 100 if pruned else 900, "peak_bytes": 10 if pruned else 90, "tower_tokens": [(17, 17)] * 6}

    def stage_seconds(work, clock, plan=None, parts=None):
        if plan is None:
            return STAGES
        n = next(scale)
        return {name: [n * t for t in took] if name == "prefill" else n * took for name, took in PRUNED.items()}

    monkeypatch.setattr(measure, "Clock", lambda device: Clock(device, time))
    monkeypatch.setattr(measure, "count", count)
    monkeypatch.setattr(measure, "stage_seconds", stage_seconds)
    monkeypatch.setattr(Trace, "entering", lambda self, image=0: (10, 16)[image])
    monkeypatch.setattr(Trace, "layer_average", lambda self, image=0: (4, 9)[image])
    found = cell("fastv", Effort(pairs=4, plain=2, stages=2, new_tokens=5), batch=2, keep=4)
    assert not [*first["pruned"], *first["oracle"], *first["unpruned"], *step["pruned"], *step["oracle"]]
    return found


def times(*seconds):
    """Median and quartiles in milliseconds, of few enough seconds to see it."""
    low, _, high = statistics.quantiles(seconds, method="inclusive")
    return {
        "median": pytest.approx(1e3 * statistics.median(seconds)),
        "low": pytest.approx(1e3 * low),
        "high": pytest.approx(1e3 * high),
        "runs": len(seconds),
    }


def ratios(*values):
    """Up to five ratios: their interval is all of them."""
    return {
        "median": pytest.approx(statistics.median(values)),
        "low": pytest.approx(min(values)),
        "high": pytest.approx(max(values)),
        "pairs": len(values),
    }


def test_first_tokens_by_hand(scripted):
    _, _, found = scripted
    assert found["first_token_ms"] == {
        "unpruned": times(30, 70),
        "pruned": times(3, 5, 7, 11),
        "oracle": times(2, 13, 17, 19),
    }
    assert found["overhead"] == ratios(3 / 2, 5 / 13, 7 / 17, 11 / 19)
    assert found["speedup"] == ratios(30 / 5, 70 / 11)  # beside pairs 1 and 3
    assert found["oracle_speedup"] == ratios(30 / 13, 70 / 19)


def test_decoding_by_hand(scripted):
    _, _, found = scripted
    assert found["decode_ms"] == {
        "unpruned": times(40, 60, 80, 90, 110, 160),
        "pruned": times(2, 3, 5, 7, 11, 13),
        "oracle": times(1, 4, 6, 8, 9, 10),
    }
    assert found["decode_overhead"] == ratios(2, 3 / 4, 5 / 6, 7 / 8, 11 / 9, 13 / 10)
    assert found["decode_speedup"] == ratios(40 / 2, 60 / 3, 80 / 5, 90 / 7, 110 / 11, 160 / 13)
    # medians: first tokens 50, 6 and 15, steps 85, 6 and 7; four steps behind the first token
    assert found["answer_speedup"] == pytest.approx((50 + 4 * 85) / (6 + 4 * 6))
    assert measure.answer_speedup(found, 5, "oracle") == pytest.approx((50 + 4 * 85) / (15 + 4 * 7))
    assert measure.answer_speedup(found, 1) == pytest.approx(50 / 6)


def test_stages_and_their_share_by_hand(scripted):
    _, base, found = scripted
    stages = found["stages_ms"]
    assert stages["taps"] == times(1, 10)
    assert stages["prefill"] == [times(70, 700), times(80, 800)]
    assert stages["total"] == times(356, 3560)
    assert found["cost_share"] == ratios((1 + 2 + 3) / 30, 10 * (1 + 2 + 3) / 70)  # each with the run beside it
    assert base["stages_ms"]["tower"] == times(0.5, 0.5)
    assert base["stages_ms"]["prefill"] == [times(1, 1)]


def test_tokens_and_memory_by_hand(scripted):
    here, base, found = scripted
    assert found["tokens"]["entering"] == 13
    assert found["tokens"]["layer_average"] == 6.5
    assert found["tokens"]["kv_lengths"] == [23, 23, 11, 11]
    assert found["stretches"] == [
        {"first_layer": 0, "layers": 2, "columns": 23},
        {"first_layer": 2, "layers": 2, "columns": 11},
    ]
    assert (found["peak_bytes"], base["peak_bytes"]) == (10, 90)
    assert (found["flops"]["counted"], base["flops"]["counted"]) == (100, 900)
    lengths = ([23, 23, 11, 11], [23] * 4)
    for one, tokens in zip((found, base), lengths, strict=True):
        assert one["flops"]["formula"] == 2 * formula_flops(here.model.config, tokens, [(17, 17)] * 6, 1)
        assert one["kv_bytes"] == 2 * 2 * 2 * 8 * 4 * sum(tokens)  # rows, keys and values, heads, width, bytes
    assert base["batch"] == 2
    assert base["tokens"] == {"visual": 16, "patches": 16, "prompt": 23}
    assert found["amdahl"] == amdahl(here, base["stages_ms"], [23, 23, 11, 11])


def test_how_far_the_oracle_is_off(cell, monkeypatch):
    """As a share of the largest logit."""
    real = Oracle.prefill

    def off(self):
        token = real(self)
        self.logits = 1.5 * self.logits
        return token

    monkeypatch.setattr(Oracle, "prefill", off)
    assert cell(effort=Effort(1, 1, 1, 1), keep=4)[2]["same_as_oracle"] == pytest.approx(0.5, abs=1e-4)


def test_contenders_take_turns_in_decoding(cell, monkeypatch):
    order = []
    real = measure.Contender.step
    monkeypatch.setattr(measure.Contender, "step", lambda self, *a: order.append(id(self)) or real(self, *a))
    cell(effort=Effort(1, 1, 1, 4), keep=4)
    one, other, third = [order[i : i + 3] for i in (0, 3, 6)]
    assert len({*one}) == 3
    assert (other, third) == (one[::-1], one)


@pytest.mark.parametrize(("tokens", "steps"), [(2, None), (3, 4), (4, 4), (6, 4)])
def test_answers_are_decoded_until_there_are_as_many_steps_as_pairs(cell, tokens, steps):
    """Beside the first unpruned run where that is enough, beside more where answers are short."""
    found = cell(effort=Effort(4, 4, 1, tokens), keep=4)[2]
    assert (found["decode_ms"]["pruned"]["runs"] if "decode_ms" in found else None) == steps
