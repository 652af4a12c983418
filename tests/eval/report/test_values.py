"""Numbers of rows and of the ledger, by hand, where sums, means, largest and smallest all differ."""

from __future__ import annotations

import numpy as np
import pytest
import run_folders as made

from vlmprune.eval.lmms import store
from vlmprune.eval.report import ledger, tables
from vlmprune.eval.report.gather import gather
from vlmprune.eval.report.rows import Results


def gathered(cells):
    return gather(store.StoredRun(None, {"cells": [c["cell"]["id"] for c in cells]}, cells, []))


def row(cells, name, task):
    return next(r for r in gathered(cells).of("scene-llava", task) if r.name == name)


def costs(cell, **values):
    """A cell that cost so much."""
    cell["elapsed_s"] = values.pop("elapsed_s", 2.0)
    cell["summary"] |= values
    return cell


def seeds(count, task="pope", **values):
    """Cells of `random`, each with its own value of what is named."""
    cells = [made.cell("random", 0.1, task, seed) for seed in range(count)]
    return [costs(cell, **{word: given[i] for word, given in values.items()}) for i, cell in enumerate(cells)]


def test_what_a_row_says_of_several_seeds():
    cells = seeds(
        3, tokens_before=[100, 100, 400], tokens_after=[10, 20, 60], layer_average=[1, 2, 6], ttft_s=[3, 4, 8],
        decode_tokens_per_s=[None, 10, 30], peak_memory_bytes=[50, None, 70], elapsed_s=[1, 2, 4],
    )  # fmt: skip
    mine = row(cells, "random keep 0.1", "pope")
    assert (mine.tokens_before, mine.tokens_after, mine.layer_average, mine.ttft_s) == (200, 30, 3, 5)
    assert (mine.decode_tokens_per_s, mine.peak_memory_bytes, mine.elapsed_s) == (20, 70, 7)
    assert mine.seeds == 3


def test_the_spread_of_two_seeds_and_of_one():
    two = seeds(2)
    a, b = (cell["metrics"]["accuracy"]["value"] for cell in two)
    assert a != b
    assert row(two, "random keep 0.1", "pope").spread == pytest.approx(abs(a - b) / 2**0.5)
    assert row(two[:1], "random keep 0.1", "pope").spread is None


def test_what_a_row_over_all_tasks_says():
    def both(name, **values):
        """The cells of a method on two tasks: every value has one for each."""
        cells = [
            made.cell("none" if name == "none" else name, None if name == "none" else 0.1, task, samples=samples)
            for task, samples in (("pope", 60), ("gqa", 30))
        ]
        return [costs(cell, **{word: given[i] for word, given in values.items()}) for i, cell in enumerate(cells)]

    cells = both("none") + both(
        "fopru", tokens_before=[100, 300], tokens_after=[10, 50], layer_average=[4, 8], ttft_s=[1, 3],
        decode_tokens_per_s=[5, None], peak_memory_bytes=[90, 70], elapsed_s=[3, 5],
    )  # fmt: skip
    mine = row(cells, "fopru keep 0.1", None)
    assert (mine.samples, mine.clusters, mine.elapsed_s, mine.peak_memory_bytes) == (90, 10, 8, 90)
    assert (mine.tokens_before, mine.tokens_after, mine.layer_average, mine.ttft_s) == (200, 30, 6, 2)
    assert mine.decode_tokens_per_s is None  # the mean of one task would be none over all
    ratios = [row(cells, "fopru keep 0.1", task).retention for task in ("pope", "gqa")]
    assert mine.retention == pytest.approx(sum(ratios) / 2)
    assert ratios[0] != ratios[1]


def test_a_sample_without_a_score_leaves_no_interval():
    none, fopru = made.cell("none", None), made.cell("fopru", 0.1)
    fopru["samples"][5]["score"] = None
    mine = row([none, fopru], "fopru keep 0.1", "pope")
    assert (mine.low, mine.note) == (None, "accuracy has no score per sample, so no interval")
    assert mine.value is not None


def test_a_value_that_is_nearly_the_mean_is_taken_for_it():
    """lmms-eval rounds; a thousandth off is another quantity."""
    for off, there in ((5e-5, True), (2e-4, False)):
        cells = [made.cell("none", None), made.cell("fopru", 0.1)]
        cells[1]["metrics"]["accuracy"]["value"] += off
        assert (row(cells, "fopru keep 0.1", "pope").low is not None) == there


def own_schedule(average):
    cell = made.cell("transprune", 0.25)
    cell["cell"] |= {"budget": None, "id": "transprune--own"}
    return costs(cell, layer_average=average)


def test_no_random_of_the_same_cost_where_costs_are_not_known():
    random = costs(made.cell("random", 0.1, seed=0), layer_average=None)
    assert row([made.cell("none", None), random, own_schedule(26)], "transprune", "pope").random_base is None
    known = made.cell("random", 0.1, seed=0)
    assert row([made.cell("none", None), known, own_schedule(None)], "transprune", "pope").random_base is None
    assert (
        row([made.cell("none", None), known, own_schedule(26)], "transprune", "pope").random_base == "random keep 0.1"
    )


@pytest.mark.parametrize(
    ("tasks", "state"),
    [("failed failed", "failed"), ("failed", "failed"), ("ok failed", "incomplete"), ("ok", "incomplete")],
)
def test_the_state_over_all_tasks_where_no_ratio_is_known(tasks, state):
    """Without the unpruned model; what is the same for all tasks is said as it is."""
    names = zip(("pope", "gqa"), tasks.split(), strict=False)
    cells = [made.cell("fopru", 0.1, task, error=None if how == "ok" else "no memory") for task, how in names]
    assert row(cells, "fopru keep 0.1", None).state == state
    assert row(cells, "fopru keep 0.1", None).seeds == 1


# The ledger


def published(value, **more):
    return {"method": "fopru", "keep": 0.1, "task": "pope", "metric": "accuracy", "value": value, "model": None,
            "definition": "d", "source": "s"} | more  # fmt: skip


def line(cells, entry):
    return ledger.lines(Results({"published": [entry]}, cells))[0]


def scored(value, *args, **more):
    cell = made.cell(*args, **more)
    cell["metrics"]["accuracy"]["value"] = value
    return cell


@pytest.mark.parametrize(
    ("paper", "ours", "shown", "note"),
    [
        (80, 0.75, 75, "ours times 100"),
        (1.6, 0.75, 75, "ours times 100"),
        (1.5, 0.75, 0.75, ""),
        (0.8, 0.75, 0.75, ""),
        (80, 75, 75, ""),
        (80, 1.0, 100, "ours times 100"),
        (80, 0.0, 0, "ours times 100"),
        (80, -0.5, -0.5, ""),
    ],
)
def test_our_number_is_in_the_papers_unit(paper, ours, shown, note):
    found = line([scored(ours, "fopru", 0.1)], published(paper))
    assert (found.paper, found.ours, found.note) == (paper, shown, note)
    assert found.difference == pytest.approx(shown - paper)


def test_our_number_is_the_mean_over_seeds_that_did_not_fail():
    cells = [scored(value, "random", 0.1, seed=seed) for seed, value in enumerate((10.0, 20.0, 60.0))]
    cells.append(made.cell("random", 0.1, seed=3, error="no memory"))
    assert line(cells, published(40, method="random")).ours == 30
    assert line(cells[3:], published(40, method="random")).note == "failed"


def test_ours_on_fewer_samples_are_said_to_be():
    cell = scored(0.5, "fopru", 0.1, samples=12, limit=12)
    assert line([cell], published(0.5)).note == "ours on the first 12 samples only"
    assert line([cell], published(50)).note == "ours times 100; ours on the first 12 samples only"
    assert line([scored(0.5, "fopru", 0.1, limit=None)], published(0.5)).note == ""


def test_what_a_published_number_is_about():
    cells = [
        scored(1.0, "fopru", 0.1),
        scored(2.0, "fopru", 0.25),
        scored(3.0, "fopru", 0.1, "gqa"),
        scored(4.0, "fopru", 0.1, label="mine"),
        scored(5.0, "none", None, label="whole"),
        scored(6.0, "fopru", 0.1, model="other"),
        scored(7.0, "fopru", 0.1, word="average"),
    ]
    ours = lambda **more: line(cells, published(0.0, model="scene-llava") | more).ours  # noqa: E731
    assert ours() == 1
    assert ours(keep=0.25) == 2
    assert ours(task="gqa") == 3
    assert ours(method="mine") == 4
    assert ours(method="none", keep=None) == 5
    assert ours(model="other") == 6
    assert ours(keep=None, average=0.1) == 7
    assert ours(model=None) == np.mean([1, 6])
    absent = line(cells, published(0.0, keep=0.5))
    assert (absent.ours, absent.difference, absent.note) == (None, None, "not evaluated here")
    other = line(cells, published(0.0, metric="f1"))
    assert (other.ours, other.note) == (None, "the task gave no f1, but accuracy, other")


def test_a_smaller_picture_is_named():
    """All tokens of a picture that was shrunk and enlarged again are there; a smaller picture has fewer."""
    for before, after, name in ((64, 64, "downsample"), (64, 16, "downsample (fewer pixels)")):
        cells = [costs(made.cell("downsample", 0.25, "pope"), tokens_before=before, tokens_after=after)]
        assert tables.shown(row(cells, "downsample keep 0.25", "pope")) == name
