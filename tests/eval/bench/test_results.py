"""Results in files, going on with them, comparing and drawing them; selection alone."""

from __future__ import annotations

import copy
import csv
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import vlmprune
from vlmprune.eval.bench import compare, results, selection
from vlmprune.eval.bench.measure import Effort, measure_method, measure_unpruned
from vlmprune.eval.bench.plot import plot
from vlmprune.eval.bench.workload import make_workload


@pytest.fixture(scope="module")
def found():
    """Real results of two methods and two budgets at two batch sizes."""
    import tiny

    model, effort = tiny.shared(), Effort(pairs=2, plain=1, stages=1, new_tokens=4)
    made = {
        "bench": results.SCHEMA,
        "asked": {"pairs": 2, "plain_runs": 1, "stage_runs": 1},
        "model": {"description": "tiny", "visual": 16},
        "settings": {"model": "tiny", "device": "cpu", "dtype": "float32", "prompt_tokens": 7, "new_tokens": 4},
        "machine": results.describe_machine("cpu"),
        "unpruned": [],
        "cells": [],
    }
    jobs = [SimpleNamespace(method=m, options={"keep": k}, budget=str(k)) for m in ("random", "fastv") for k in (4, 8)]
    works = {batch: make_workload(model, batch, 7) for batch in (1, 2)}
    results.run_grid(
        made,
        [(job, batch) for batch in works for job in jobs],
        lambda batch: measure_unpruned(works[batch], effort),
        lambda job, batch, base: measure_method(
            works[batch], vlmprune.patch(model, job.method, **job.options), base, effort
        ),
        lambda now: None,
    )
    return made


def test_json_there_and_back(found, tmp_path):
    path = tmp_path / "r.json"
    results.write_json(found, path)
    assert results.read(path) == json.loads(json.dumps(found))
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1}', "{"])
def test_other_files_are_no_results(tmp_path, text):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="holds no results"):
        results.read(path)


def test_results_of_another_format(tmp_path):
    path = tmp_path / "r.json"
    path.write_text('{"bench": 0}')
    with pytest.raises(ValueError, match="format 0"):
        results.read(path)


def test_going_on_measures_what_is_missing(found):
    half = copy.deepcopy(found)
    half["cells"] = half["cells"][:1] + half["cells"][2:3]
    half["unpruned"] = half["unpruned"][:1]
    done, stored = [], []
    wanted = [
        (SimpleNamespace(**{k: c[k] for k in ("method", "options", "budget")}), c["batch"]) for c in found["cells"]
    ]
    results.run_grid(
        half,
        wanted,
        lambda batch: done.append(("unpruned", batch)) or {"batch": batch},
        lambda job, batch, base: done.append((job.method, job.budget, batch, base["batch"])) or {},
        lambda now: stored.append(len(now["cells"])),
    )
    assert done == [
        ("random", "8", 1, 1),
        ("fastv", "8", 1, 1),
        ("unpruned", 2),
        ("random", "4", 2, 2),
        ("random", "8", 2, 2),
        ("fastv", "4", 2, 2),
        ("fastv", "8", 2, 2),
    ]
    assert stored == [3, 4, 5, 6, 7, 8]


def test_csv_has_a_line_per_cell(found, tmp_path):
    results.write_csv(found, tmp_path / "r.csv")
    with open(tmp_path / "r.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(x["method"], x["options.keep"], x["batch"]) for x in lines[:2]] == [
        ("random", "4", "1"),
        ("random", "8", "1"),
    ]
    assert len(lines) == 8
    assert float(lines[0]["overhead.median"]) == found["cells"][0]["overhead"]["median"]
    assert int(lines[4]["unpruned.kv_bytes"]) == found["unpruned"][1]["kv_bytes"]
    assert float(lines[0]["unpruned.stages_ms.tower"]) > 0


def test_nothing_changed(found):
    assert all(c["change"] == 0 and c["verdict"] == "" for c in compare.changes(found, found))
    assert len(compare.changes(found, found)) == 8 * len(compare.FIGURES)
    assert compare.differing_settings(found, found) == {}


def test_what_changed(found):
    new = copy.deepcopy(found)
    new["cells"][0]["overhead"] = {"median": 9.0, "low": 8.0, "high": 10.0, "pairs": 2}
    new["cells"][0]["speedup"] = {"median": 900.0, "low": 800.0, "high": 1000.0, "pairs": 2}
    new["cells"][0]["kv_bytes"] //= 2
    new["machine"]["threads"] += 1
    del new["cells"][-1]
    changed = {c["figure"]: (c["verdict"], c["change"]) for c in compare.changes(found, new) if c["verdict"]}
    assert changed["overhead"][0] == "worse"
    assert changed["speed-up"][0] == "better"
    assert changed["KV bytes"] == ("better", -0.5)
    assert len(changed) == 3
    assert compare.differing_settings(found, new) == {
        "threads": (found["machine"]["threads"], found["machine"]["threads"] + 1)
    }


def test_overlapping_intervals_say_nothing(found):
    new = copy.deepcopy(found)
    over = new["cells"][0]["overhead"]
    over["median"], over["low"] = over["high"] * 1.5, over["low"]
    over["high"] *= 2
    assert not any(c["verdict"] for c in compare.changes(found, new))


def test_a_plot_shows_oracle_methods_and_batches(found, tmp_path):
    plot(found, tmp_path / "r.svg")
    drawn = (tmp_path / "r.svg").read_text()
    for text in ("random: oracle", "fastv: oracle", "unpruned", "random", "fastv", "batch 1", "batch 2"):
        assert f"<!-- {text} -->" in drawn
    plot(found, tmp_path / "r.png")
    with Image.open(tmp_path / "r.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20


def test_every_method_has_its_oracles_line_and_unpruned_is_a_median(found, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    new, drawn = copy.deepcopy(found), {}
    new["cells"] = [cell for cell in new["cells"] if cell["batch"] == 1]
    for number, cell in enumerate(new["cells"]):  # random 4 and 8, fastv 4 and 8
        times = cell["first_token_ms"]
        times["unpruned"]["median"], times["oracle"]["median"] = 100.0 + 2 * number, 10.0 + number
    real = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda *a, **kw: drawn.update({kw["label"]: a[1:3]}) or real(*a, **kw))
    plot(new, tmp_path / "r.svg")
    assert drawn["unpruned"] == (16, 103.0)
    assert drawn["random: oracle"] == ((4, 8, 16), (10.0, 11.0, 103.0))
    assert drawn["fastv: oracle"] == ((10, 12, 16), (12.0, 13.0, 103.0))


def test_cells_of_another_run_are_taken_over(found):
    mine, theirs = copy.deepcopy(found), copy.deepcopy(found)
    mine["cells"], mine["unpruned"] = mine["cells"][:2], mine["unpruned"][:1]
    theirs["cells"] = theirs["cells"][1:]
    theirs["cells"][0]["kv_bytes"] = -1  # measured twice: one's own stays
    theirs["settings"]["replaced"] = ["merge: not on cuda"]
    results.absorb(mine, theirs)
    assert results.cells_by_key(mine) == results.cells_by_key(found)
    assert [one["batch"] for one in mine["unpruned"]] == [1, 2]
    assert mine["settings"]["replaced"] == ["merge: not on cuda"]


def test_older_files_were_measured_with_kernels_auto(found):
    new = copy.deepcopy(found)
    new["settings"] |= {"kernels": "auto", "replaced": []}
    assert compare.differing_settings(found, new) == {}
    new["settings"]["kernels"] = "torch"
    assert compare.differing_settings(found, new) == {"kernels": ("auto", "torch")}


def test_nothing_to_draw(found, tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        plot(found | {"cells": []}, tmp_path / "r.png")


@pytest.mark.parametrize("objective", selection.PUBLISHED)
def test_the_published_loops_pick_what_the_library_picks(objective):
    for tokens, count in ((60, 20), (576, 64)):
        x, first = selection.features_like(tokens, 64, seed=1), None if objective == "coverage" else 7
        order = selection.ours(objective, x[None], torch.tensor([7]), count)
        assert selection.PUBLISHED[objective](x, first, count) == order.tolist()


def test_the_loop_in_our_words_is_the_published_one():
    """DivPrune's own picks, first one included (tests/goldens)."""
    import json
    from pathlib import Path

    from safetensors.torch import load_file

    folder = Path(__file__).parents[2] / "goldens"
    if not (folder / "baselines.json").exists():
        pytest.skip("the goldens of baselines are not here")
    tensors = load_file(folder / "baselines.safetensors")
    cases = [
        case for case in json.loads((folder / "baselines.json").read_text())["cases"] if case["method"] == "divprune"
    ]
    assert cases
    for case in cases:
        find = lambda what: next(v for k, v in tensors.items() if k.startswith(case["name"]) and k.endswith(what))  # noqa: B023, E731
        picks = find("picks_in_order").tolist()
        assert selection.published_max_min(find("features"), None, len(picks)) == picks


def test_selection_is_timed_in_pairs():
    both = selection.compare_selection(tokens=300, keep=12, dim=64, pairs=3)
    assert [one["objective"] for one in both] == ["max_min", "log_det", "coverage"]
    for one in both:
        assert one["speedup"]["pairs"] == 3
        assert one["same_picks"] > 0.9
