"""From cells to rows: what is compared with what, on which samples, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import run_folders as made

from vlmprune.eval import statistics
from vlmprune.eval.lmms import store
from vlmprune.eval.report import read, summary, words
from vlmprune.eval.report.gather import gather
from vlmprune.eval.report.overall import together


def gathered(cells, missing=()):
    return gather(
        store.StoredRun(None, {"cells": [c["cell"]["id"] for c in cells] + list(missing)}, cells, list(missing))
    )


def row(results, name, task, model="scene-llava"):
    return next(r for r in results.of(model, task) if r.name == name)


def scores(cell):
    return np.array([s["score"] for s in cell["samples"]])


def test_rows_hold_what_the_cells_say():
    cells = made.grid_of()
    results = gathered(cells)
    full, fopru = row(results, "none", "pope"), row(results, "fopru keep 0.1", "pope")
    cell = next(c for c in cells if c["cell"]["id"] == "scene-llava--fopru--keep-0.1--pope")
    assert fopru.value == cell["metrics"]["accuracy"]["value"]
    assert (fopru.tokens_before, fopru.tokens_after, fopru.layer_average) == (256, 26, 26)
    assert fopru.full_difference == fopru.value - full.value
    assert fopru.retention == fopru.value / full.value
    assert (fopru.samples, fopru.clusters, fopru.state, fopru.note) == (60, 20, "ok", "")
    assert (full.full_difference, full.random_difference, full.retention) == (None, None, 1.0)
    assert not results.problems


def test_random_is_the_mean_over_seeds_of_every_sample():
    cells = made.grid_of()
    results = gathered(cells)
    seeds = [c for c in cells if c["cell"]["label"] == "random" and c["cell"]["budget"] == {"keep": 0.1}]
    values = [c["metrics"]["accuracy"]["value"] for c in seeds]
    random = row(results, "random keep 0.1", "pope")
    assert random.seeds == 3
    assert random.value == pytest.approx(np.mean(values))
    assert random.spread == pytest.approx(np.std(values, ddof=1))
    fopru = row(results, "fopru keep 0.1", "pope")
    assert fopru.random_difference == pytest.approx(fopru.value - np.mean(values))
    # the interval, from scratch: documents in the order of their names, pictures drawn whole
    order = sorted(range(60), key=str)
    mine = scores(next(c for c in cells if c["cell"]["id"] == "scene-llava--fopru--keep-0.1--pope"))
    difference = (mine - np.mean([scores(c) for c in seeds], 0))[order]
    pictures = [f"picture-{i // 3}" for i in order]
    expected = statistics.interval(statistics.Resampler(pictures).means(pictures, difference))
    assert (fopru.random_low, fopru.random_high) == pytest.approx(expected)
    assert fopru.random_verdict == statistics.verdict(*expected)


def test_the_order_of_cells_and_samples_does_not_matter():
    cells = made.grid_of(("none", "fopru", "random"))
    plain = gathered(cells)
    for i, cell in enumerate(cells):
        cell["samples"] = list(np.random.default_rng(i).permutation(cell["samples"]))
    assert gathered(cells).rows == plain.rows


def test_a_method_that_answers_like_the_full_model_is_equal_not_noise():
    none, fopru = made.cell("none", None), made.cell("fopru", 0.25, missed=0.0)
    fopru["samples"] = none["samples"]
    fopru["metrics"] = none["metrics"]
    mine = row(gathered([none, fopru]), "fopru keep 0.25", "pope")
    assert (mine.full_difference, mine.full_verdict) == (0, "equal")
    # no cluster differs, which says no more than that few do
    assert -mine.full_low == mine.full_high == pytest.approx(1 - 0.025 ** (1 / mine.clusters))
    assert mine.retention == 1
    assert (mine.retention_low, mine.retention_high) == pytest.approx(
        (1 + mine.full_low / mine.value, 1 + mine.full_high / mine.value)
    )


def test_each_budget_has_its_own_random():
    results = gathered(made.grid_of())
    for budget in ("keep 0.25", "keep 0.1"):
        fopru, random = row(results, f"fopru {budget}", "pope"), row(results, f"random {budget}", "pope")
        assert fopru.random_difference == pytest.approx(fopru.value - random.value)
        assert random.random_difference is None
    alone = gathered([*made.grid_of(("none", "random")), made.cell("fopru", 64)])
    assert row(alone, "fopru keep 64", "pope").random_difference is None


def own(label="atp", average=None, **more):
    """A cell of a method on a schedule of its own, with so many tokens in the mean over layers."""
    cell = made.cell("atp", 0.25, label=label, **more)
    cell["cell"] |= {"budget": None, "id": f"{label}--own--{cell['cell']['task']}"}
    cell["summary"]["layer_average"] = average
    return cell


@pytest.mark.parametrize(
    ("average", "base"), [(64, "keep 0.25"), (62, "keep 0.25"), (67, "keep 0.25"), (60, None), (26.5, "keep 0.1")]
)
def test_a_schedule_of_its_own_meets_the_random_of_the_same_cost(average, base):
    results = gathered([*made.grid_of(), own(average=average)])
    for task in ("pope", None):
        mine = row(results, "atp", task)
        if base is None:
            assert (mine.random_base, mine.random_difference) == (None, None)
            assert "no random has a layer average within 5% of its 60.0: the nearest is random keep 0.25" in mine.note
            continue
        random = row(results, f"random {base}", task)
        assert mine.random_base == f"random {base}"
        assert mine.random_difference == pytest.approx(mine.value - random.value)
        assert mine.random_verdict is not None
        assert f"compared with random {base} (layer average {random.layer_average:.1f}, its own is" in mine.note
    (said,) = words.own_schedules(results.of("scene-llava", None))
    assert said.endswith(f"atp with random {base}." if base else "atp with none (none is within 5%).")
    told = words.differences(results.of("scene-llava", "pope"))
    assert any("Own budget, against random of about the same layer average" in one for one in told) == bool(base)
    assert row(results, "fopru keep 0.1", "pope").random_base is None


def test_without_random_a_schedule_of_its_own_says_nothing():
    results = gathered([*made.grid_of(("none", "fopru")), own(average=64)])
    assert (row(results, "atp", "pope").random_difference, row(results, "atp", "pope").note) == (None, "")
    assert words.own_schedules(results.of("scene-llava", None)) == []


def test_overall_is_the_mean_of_ratios_whatever_the_unit():
    cells = made.grid_of(tasks=("pope",)) + made.grid_of(tasks=("vqa",), scale=100.0)
    results = gathered(cells)
    both = [row(results, "fopru keep 0.1", task) for task in ("pope", "vqa")]
    over = row(results, "fopru keep 0.1", None)
    assert over.value == over.retention == pytest.approx(np.mean([r.retention for r in both]))
    assert over.low < over.value < over.high
    assert over.full_difference == pytest.approx(over.value - 1)
    assert over.random_difference == pytest.approx(over.value - row(results, "random keep 0.1", None).value)
    assert both[1].value > 1.5
    assert both[1].low < both[1].value < both[1].high
    full = row(results, "none", None)
    assert (full.value, full.low, full.high) == (1, 1, 1)
    # the spread over seeds is that of the seeds' own mean ratios
    base = {task: row(results, "none", task).value for task in ("pope", "vqa")}
    seeds = {}
    for c in cells:
        if c["cell"]["label"] == "random" and c["cell"]["budget"] == {"keep": 0.1}:
            seeds.setdefault(c["cell"]["seed"], []).append(c["metrics"]["accuracy"]["value"] / base[c["cell"]["task"]])
    assert row(results, "random keep 0.1", None).spread == pytest.approx(
        np.std([np.mean(v) for v in seeds.values()], ddof=1)
    )


def test_pictures_that_tasks_share_are_drawn_together():
    assert together({"a": "xy", "b": "yz", "c": "uv", "d": "zw"}) == [["c"], ["a", "b", "d"]]
    # the same answers asked twice: as two tasks over the same pictures they are no more certain than one
    cells = made.grid_of(("none", "fopru"), keeps=(0.1,), tasks=("pope",))
    twins = made.grid_of(("none", "fopru"), keeps=(0.1,), tasks=("pope",))
    for cell in twins:
        cell["cell"] |= {"task": "twin", "id": cell["cell"]["id"] + "-twin"}
    one, two = row(gathered(cells), "fopru keep 0.1", None), row(gathered(cells + twins), "fopru keep 0.1", None)
    assert (one.low, one.high) == pytest.approx((two.low, two.high))
    for cell in twins:  # other pictures: more certain
        cell["samples"] = [s | {"cluster": f"other {s['cluster']}"} for s in cell["samples"]]
    three = row(gathered(cells + twins), "fopru keep 0.1", None)
    assert three.high - three.low < 0.85 * (one.high - one.low)


def test_document_numbers_of_different_tasks_are_not_the_same_cluster():
    single = made.grid_of(("none", "fopru"), keeps=(0.1,), tasks=("pope", "twin"), per_picture=1)
    results = gathered(single)
    assert row(results, "fopru keep 0.1", "pope").clusters == 60
    for task in ("pope", "twin"):
        for cell in single:
            if cell["cell"]["task"] == task:
                cell["samples"] = [s | {"cluster": f"{task} {s['cluster']}"} for s in cell["samples"]]
    named = row(gathered(single), "fopru keep 0.1", None)
    mine = row(results, "fopru keep 0.1", None)
    assert (mine.low, mine.high) == (named.low, named.high)


@pytest.mark.parametrize("how", [{"per_sample": False}, {"scale": 1500.0}])
def test_metrics_that_are_no_mean_have_a_value_and_no_interval(how):
    results = gathered(made.grid_of(tasks=("mme",), metric="mme_score", **how))
    fopru = row(results, "fopru keep 0.1", "mme")
    assert fopru.value is not None
    assert fopru.retention is not None
    assert fopru.random_difference is not None
    assert (fopru.low, fopru.full_low, fopru.random_low, fopru.random_verdict, fopru.retention_low) == (None,) * 5
    assert "mme_score" in fopru.note
    assert "no interval" in fopru.note
    over = row(results, "fopru keep 0.1", None)
    assert over.value is not None
    assert over.low is None
    assert over.note == "no interval: no scores per sample in mme"


def test_less_may_be_better():
    results = gathered(made.grid_of(tasks=("errors",), metric="error_rate", higher=False))
    full, random = row(results, "none", "errors"), row(results, "random keep 0.1", "errors")
    assert random.value > full.value
    assert random.full_verdict == "worse"
    assert random.retention == full.value / random.value
    assert row(results, "fopru keep 0.1", "errors").random_verdict == "better"


def test_other_samples_are_not_compared():
    cells = made.grid_of()
    cut = made.cell("vtc_cls", 0.1, samples=30)
    other = made.cell("grid", 0.1)
    other["samples"] = [s | {"target": "no"} if s["doc"] == 7 else s for s in other["samples"]]
    results = gathered([*cells, cut, other])
    for name, why in (("vtc_cls keep 0.1", "30 samples"), ("grid keep 0.1", "as many, but other samples")):
        mine = row(results, name, "pope")
        assert (mine.state, mine.value, mine.full_difference, mine.retention) == ("other samples", None, None, None)
        assert why in mine.note
        assert row(results, name, None).value is None
    assert [p.state for p in results.problems] == ["other samples"] * 2
    assert row(results, "fopru keep 0.1", "pope").value is not None


def test_failed_and_missing_cells_stay_visible():
    cells = made.grid_of(tasks=("pope", "gqa"))
    cells = [c for c in cells if c["cell"]["id"] != "scene-llava--fopru--keep-0.1--gqa"]
    seed = next(c for c in cells if c["cell"]["id"] == "scene-llava--random--keep-0.1--gqa--seed-1")
    cells[cells.index(seed)] = made.cell("random", 0.1, "gqa", 1, error="RuntimeError: out of memory")
    cells += [made.cell("fopru", 0.1, "gqa", error="ValueError: bad"), made.cell("pool", 0.1, "pope")]
    results = gathered(cells, ["scene-llava--pool--keep-0.1--gqa"])
    assert {(p.cell.split("--", 1)[1], p.state) for p in results.problems} == {
        ("fopru--keep-0.1--gqa", "failed"), ("random--keep-0.1--gqa--seed-1", "failed"),
        ("pool--keep-0.1--gqa", "missing"),
    }  # fmt: skip
    assert row(results, "fopru keep 0.1", "gqa").state == "failed"
    assert row(results, "pool keep 0.1", "gqa").state == "missing"
    random = row(results, "random keep 0.1", "gqa")
    assert (random.state, random.seeds, random.note) == ("ok", 2, "1 of 3 seeds left out: RuntimeError: out of memory")
    over = row(results, "pool keep 0.1", None)
    assert (over.state, over.value) == ("incomplete", None)
    assert "gqa (missing)" in over.note


def test_without_the_full_model_there_is_no_retention():
    results = gathered(made.grid_of(("fopru", "random")))
    fopru = row(results, "fopru keep 0.1", "pope")
    assert fopru.retention is None
    assert fopru.random_difference is not None
    assert row(results, "fopru keep 0.1", None).value is None


def test_a_full_model_without_a_right_answer_gives_no_ratio():
    cells = [made.cell("none", None, missed=1.0), made.cell("fopru", 0.25)]
    mine = row(gathered(cells), "fopru keep 0.25", "pope")
    assert mine.retention is None
    assert "no ratio" in mine.note


@pytest.mark.parametrize("task", ["pope", None])
def test_answers_that_differ_are_not_equal_where_every_picture_has_as_many(task):
    """The first of a picture's two questions right, or the second: no draw differs, and every sample does."""
    cells = [made.cell("none", None, per_picture=2), made.cell("fopru", 0.25, per_picture=2)]
    for which, cell in enumerate(cells):
        for i, sample in enumerate(cell["samples"]):
            sample["score"] = float(i % 2 == which)
        cell["metrics"]["accuracy"]["value"] = 0.5
    mine = row(gathered(cells), "fopru keep 0.25", task)
    assert mine.full_difference == 0
    assert mine.full_verdict == ("noise" if task else None)  # nothing bounds a ratio


def test_one_cluster_gives_no_interval():
    results = gathered(made.grid_of(per_picture=60))
    fopru = row(results, "fopru keep 0.1", "pope")
    assert (fopru.low, fopru.random_verdict) == (None, None)
    assert "one cluster" in fopru.note


def test_a_folder_on_disk_reads_the_same(tmp_path):
    cells = made.grid_of()
    assert read(made.write(tmp_path, cells)).rows == gathered(cells).rows


def test_a_score_that_all_clusters_share_has_an_interval():
    """All right in every cluster: the bootstrap sees no spread, and Clopper and Pearson's interval stands in for it."""
    cell = made.cell("none", None)
    for sample in cell["samples"]:
        sample["score"] = 1.0
    cell["metrics"][cell["metric"]]["value"] = 1.0
    mine = row(gathered([cell]), "none", "pope")
    assert (mine.low, mine.high) == pytest.approx((0.025 ** (1 / mine.clusters), 1.0))


@pytest.mark.parametrize(
    ("text", "told"),
    [('{"format": 1', "not JSON: "), ("{}", "it lacks 'cell'"), ("\x00", "not JSON: "), ("[1]", "")],
)
def test_a_damaged_cell_is_named_with_its_file(tmp_path, text, told):
    folder = made.write(tmp_path, made.grid_of())
    file = folder / "cells" / "scene-llava--fopru--keep-0.1--pope.json"
    file.write_text(text)
    results = read(folder)
    (problem,) = results.problems
    assert (problem.cell, problem.state) == (file.stem, "damaged")
    assert problem.why.startswith(f"{file}: {told}")
    assert "1 damaged" in summary(folder, results)
    assert f"Damaged:{file}" in "".join(summary(folder, results).split())
