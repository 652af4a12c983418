"""docs/table.md is what the results say, and what it says of made-up results is right."""

from __future__ import annotations

import json

import numpy as np
import pytest
import table_page as page
import table_results as results
from table import lines

from vlmprune.eval import statistics

COUNT, ABSENT = 200, 20
TASKS = {"sparse": "vlmprune_scene_llava_mixed", "crowded": "vlmprune_scene_llava_crowded_mixed"}
NOT_THERE = {"sparse": "vlmprune_scene_llava_absent", "crowded": "vlmprune_scene_llava_crowded_absent"}


def answered(label: str, budget: float | None, wrong: dict[str, list[int]], seed: int | None = None) -> list[dict]:
    """Rows of a method on scene-llava that gives wrong answers to some questions of each split."""
    made, after = [], 256 * (budget or 1.0)
    for split, task in [*TASKS.items(), *NOT_THERE.items()]:
        count = ABSENT if task in results.FALSE_YES else COUNT
        lost = np.isin(np.arange(count), list(wrong.get(split, ()))).astype(float)
        row = {"model": "scene-llava", "label": label, "method": label, "options": {}, "task": task, "count": count}
        row |= {"budget": budget and {"keep": budget}, "seed": seed, "control": label in ("none", "random")}
        row |= {"scores": results.packed(list(1 - lost)), "tokens_before": 256, "output_tokens": 2}
        row |= {"said_yes": results.packed(list(lost))} if task in results.FALSE_YES else {}
        made.append(row | {"tokens_after": after, "layer_average": after})
    return made


ALL = {"sparse": range(COUNT), "crowded": range(COUNT)}


@pytest.fixture
def made() -> dict:
    """fopru (attention) is never wrong, divprune (likeness) always; random has three seeds, of which one is wrong."""
    rows = answered("none", None, {}) + answered("fopru", 0.5, {}) + answered("divprune", 0.5, ALL)
    for seed in range(3):
        rows += answered("random", 0.5, ALL if seed == 0 else {}, seed)
    versions = {"vlmprune": "1", "torch": "2", "python": "3"}
    run = {
        "commit": "abc",
        "day": "2026-01-01",
        "device": "cpu",
        "versions": versions,
    }
    why = "it cannot | at all"
    return {
        "missing": 2,
        "runs": [run],
        "rows": rows,
        "absent": [{"model": "scene-llava", "method": "lrs", "budget": None, "why": why}],
    }


def test_the_page_is_what_the_results_say():
    answers, costs = (json.loads(path.read_text()) for path in (results.ANSWERS, results.COSTS))
    assert page.PAGE.read_text(encoding="utf-8") == page.page(lines.Table(answers, costs)), (
        "docs/table.md is not what benchmarks/table.json says: run `python scripts/table_page.py`"
    )


def test_every_row_of_the_config_is_there_or_said_to_be_missing():
    answers = json.loads(results.ANSWERS.read_text())
    config = results.load_config(results.CONFIG)
    missing = answers["missing"]
    for setting in config.settings:
        if results.native(setting) is None:
            there = {row["label"] for row in answers["rows"] if row["model"] == setting.name} - {results.NATIVE}
            labels = {entry.label for entry in (*setting.methods, *setting.controls)}
            assert there <= labels
            assert there == labels or missing
    assert ("cells of the run are missing" in page.PAGE.read_text()) == bool(missing)


def test_scores_survive_being_packed():
    rng = np.random.default_rng(0)
    bits = rng.integers(2, size=37).astype(float)
    assert np.array_equal(results.unpacked(results.packed(list(bits)), 37), bits)
    assert isinstance(results.packed(list(bits)), str)
    assert np.array_equal(results.unpacked(results.packed([0.5, 0.25]), 2), [0.5, 0.25])


def test_differences_are_paired_and_corrected_together(made):
    table = lines.Table(made, None)
    (model,) = table.models
    found = {line.label: line for line in model.lines}
    assert found["random"].seeds == 3
    assert found["random"].score == pytest.approx(200 / 3)
    assert table.comparisons == 5  # three rows with the unpruned model, two with random
    against = found["fopru"].against["random"]
    assert against.value == pytest.approx(100 / 3)
    assert against.low < against.value < against.high  # all pictures alike: the exact bounds of a share
    pictures = len({question.picture_id for split in TASKS for question in results.asked(TASKS[split], COUNT)})
    p = 2 / 2**pictures
    assert [one.p for one in (against, found["divprune"].against["full"])] == pytest.approx([p, p])
    raw = [one.p for line in model.lines for one in line.against.values()]
    assert sorted(raw)[-1] == 1  # fopru is the unpruned model's equal
    assert against.adjusted in statistics.holm(raw)
    assert against.adjusted > p
    assert against.better
    assert found["divprune"].against["random"].worse
    assert not found["fopru"].against["full"].sure


def test_what_is_said_of_methods_follows(made):
    told = page.page(lines.Table(made, None))
    assert "| scene-llava, 50 % | 2 | 1 | 0 | 1 | 1 | 66.7 | 100.0 | `fopru` |" in told
    assert "- scene-llava: `divprune` (50 %: -66.7)." in told
    assert "differ for certain on sparse pictures at 50 % (-100.0) and on crowded pictures at 50 % (-100.0)" in told
    assert "| scene-llava, 50 % | 0 | 33 | 0 | 100 |  |  | **+100.0** [+82.4, +100.0] |" in told
    assert f"({2 * ABSENT} of scene-llava)" in told
    assert "say yes more often for certain at:\nscene-llava, 50 %; less often at: none." in told
    assert "as means over the same methods: 100 at most" in told
    assert "2 cells of the run are missing" in told
    assert r"| `lrs` | scene-llava | it cannot \| at all |" in told
    swapped = json.loads(json.dumps(made).replace("fopru", "@").replace("divprune", "fopru").replace("@", "divprune"))
    other = page.page(lines.Table(swapped, None))
    assert "on sparse pictures at 50 % (+100.0)" in other
    assert "for certain at:\nnone; less often at: scene-llava, 50 %" in other


def test_what_compares_pixels_is_in_no_group_and_both_are_told(made):
    made["rows"] += answered("showui", 0.5, {})
    told = page.page(lines.Table(made, None))
    assert "differ for certain on sparse pictures at 50 % (-100.0) and on crowded pictures at 50 % (-100.0)" in told
    both = "on sparse pictures at 50 % (-50.0) and on crowded pictures at 50 % (-50.0)"
    assert f"With it among likeness the two differ\n{both}" in told
    (line,) = [line for line in told.splitlines() if line.startswith("| scene-llava, 50 % | 0 | 33")]
    assert "| 0 | 100 |" in line


def test_costs_and_fronts(made):
    costs = [
        {"model": "scene-llava", "label": label, "budget": {"keep": 0.5}, "flops": [100, flops], "load": 1.5}
        | {"speedup": {"median": speed, "low": speed - 0.1, "high": speed + 0.1, "pairs": 9}, "ms": [2, 1]}
        for label, flops, speed in (("fopru", 60, 2.0), ("divprune", 50, 0.5), ("random", 50, 1.05))
    ]
    machine = {"processor": "a processor", "cores": 2, "threads": 1}
    told = page.page(lines.Table(made, {"rows": costs, "pairs": 9, "machine": machine}))
    assert "| scene-llava | prefill FLOPs | `random` 50 % (50 %: 66.7); `fopru` 50 % (60 %: 100.0) |" in told
    assert "| scene-llava | prefill time | `fopru` 50 % (50 %: 100.0) |" in told
    assert "| scene-llava, 50 % | 0.50 | 2.00 | 2.00 | 1 | 1 | 2 |" in told
    assert "| `fopru` | 50 % | 60 % | 2.00 [1.90, 2.10] | 100.0 | +0.0" in told


@pytest.mark.parametrize("there", [("none",), ("none", "fopru"), ("fopru", "random"), ("none", "fopru", "random")])
def test_an_unfinished_run_makes_a_page(made, there):
    made["rows"] = [row for row in made["rows"] if row["label"] in there]
    told = page.page(lines.Table(made, None))
    assert ("#### scene-llava, 50 %" in told) == ({"none", "random"} <= set(there))
    assert "2 cells of the run are missing" in told


def test_long_answers_stand_beside_short_ones(made):
    for label, score, made_up in (("none", 0.9, 0.1), ("fopru", 0.4, 0.5), ("random", 0.2, 0.6)):
        for seed in range(3) if label == "random" else (None,):
            row = answered(label, None if label == "none" else 0.5, {}, seed)[0] | {"task": lines.LONG, "count": 20}
            row |= {"model": "scene-llava-long", "scores": [score] * 20, "made_up": made_up, "output_tokens": 70}
            made["rows"].append(row)
    told = page.page(lines.Table(made, None))
    assert "- at 50 %, 1 methods lose 0.0 points on average on scene-llava's short answers, and 50.0 on" in told
    assert "where `fopru` (50.0) lose least" in told
    (line,) = [line for line in told.splitlines() if line.startswith("| `fopru`, 50 % | 40.0 | **-50.0**")]
    assert line.endswith("| 50.0 | 70 |")
    assert "| unpruned | 90.0 |  |  | 10.0 | 70 |" in told
    assert "are made up:" not in told  # there is no method that goes by likeness
    row = answered("divprune", 0.5, {})[0] | {"task": lines.LONG, "count": 20, "model": "scene-llava-long"}
    made["rows"].append(row | {"scores": [0.3] * 20, "made_up": 0.7, "output_tokens": 70})
    told = page.page(lines.Table(made, None))
    assert "are made up: 50 % by attention and 70 % by likeness with 50 % of the tokens; unpruned 10 %." in told


def test_random_without_all_its_seeds_is_no_row(made):
    made["rows"] = [row for row in made["rows"] if row["seed"] != 2]
    assert lines.Table(made, None).models == []


def test_a_part_of_a_row_is_no_row(made):
    made["rows"] = [row for row in made["rows"] if (row["label"], row["task"]) != ("fopru", TASKS["crowded"])]
    (model,) = lines.Table(made, None).models
    assert {line.label for line in model.lines} == {"none", "divprune", "random"}


def test_a_method_with_a_budget_of_its_own_is_compared_by_layers(made):
    made["rows"] += [row | {"layer_average": 131} for row in answered("atp", None, {})]
    (model,) = lines.Table(made, None).models
    assert next(line for line in model.lines if line.label == "atp").against["random"].value == pytest.approx(100 / 3)
    for row in made["rows"]:
        row["layer_average"] = 30 if row["label"] == "atp" else row["layer_average"]
    (model,) = lines.Table(made, None).models
    assert "random" not in next(line for line in model.lines if line.label == "atp").against


def cell(**about) -> dict:
    """A cell of a run: the first 40 crowded questions (20 of what is not there), odd ones right, else yes."""
    task = about.get("task", TASKS["crowded"])
    questions = results.asked(task if task != lines.LONG else TASKS["crowded"], ABSENT if "absent" in task else 40)
    samples = [
        {"doc": i, "score": float(i % 2), "target": one.answer, "answer": one.answer if i % 2 else "yes"}
        | {"tokens_before": 100, "tokens_after": 10, "layer_average": 10 + i, "output_tokens": 2}
        for i, one in enumerate(questions)
    ]
    named = {"id": "x", "model": "scene-llava", "method": "fopru", "label": "fopru", "options": {}, "control": False}
    named |= {"budget": {"keep": 0.1}, "seed": None, "task": TASKS["crowded"]}
    return {"cell": named | about, "samples": samples[::-1], "error": None, "metrics": {"made_up": {"value": 0.25}}}


def test_a_cell_becomes_a_row():
    row = results.row_of(cell(), {})
    assert np.array_equal(results.unpacked(row["scores"], 40), np.arange(40) % 2)
    assert "said_yes" not in row
    assert (row["layer_average"], row["count"], row["control"]) == (29.5, 40, False)
    absent = results.row_of(cell(task=NOT_THERE["crowded"]), {})
    assert np.array_equal(results.unpacked(absent["said_yes"], ABSENT), 1 - np.arange(ABSENT) % 2)
    rival = results.row_of(
        cell(model="scene-llava-0.5", method="none"), {"scene-llava-0.5": ("scene-llava", {"keep": 0.5})}
    )
    assert (rival["model"], rival["label"], rival["budget"], rival["control"]) == (
        "scene-llava", results.NATIVE, {"keep": 0.5}, True
    )  # fmt: skip
    other = cell()
    other["samples"][3]["target"] = "something else"
    with pytest.raises(SystemExit, match="x answers other questions"):
        results.row_of(other, {})
    long = cell(task=lines.LONG)
    assert results.row_of(long, {})["made_up"] == 0.25


def test_native_rivals_are_told_from_their_names():
    settings = results.load_config(results.CONFIG).settings
    found = [(setting.name, results.native(setting)) for setting in settings if results.native(setting)]
    assert ("scene-qwen-0.1", ("scene-qwen", {"keep": 0.1})) in found
    assert ("scene-llava-next-0.5", ("scene-llava-next", {"keep": 0.5})) in found
    assert {keep["keep"] for _, (model, keep) in found if model == "scene-qwen"} == set(lines.BUDGETS)
