"""Runs of real cells through lmms-eval: resumed after a kill, measured anew when something changed, failures told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from clocks import PATIENCE

pytest.importorskip("lmms_eval")

from lmms_eval import evaluator

from vlmprune.cli import main
from vlmprune.eval.config.schema import load_config
from vlmprune.eval.lmms import plan as plans
from vlmprune.eval.lmms import run as runner
from vlmprune.eval.lmms import store
from vlmprune.eval.lmms.plan import make_plan
from vlmprune.eval.lmms.survey import estimate, survey
from vlmprune.yamls.tree import Mistakes

CONFIG = """\
model: scene-llava
tasks: [vlmprune_scene_llava_shape]
methods: [{name: fastv, keep: 0.25}]
controls: [none, random]
seeds: [0, 1]
limit: 2
device: cpu
output: %s
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(CONFIG % (tmp_path / "out"))
    return path


class Watcher(runner.Watcher):
    """Remembers what happened."""

    def __init__(self, stop_after=None):
        self.loaded, self.cells, self.samples_seen, self.stop_after = 0, [], [], stop_after

    def loading(self, job):
        self.loaded += 1

    def samples(self, answered, of):
        self.samples_seen.append((answered, of))

    def finished(self, cell, content):
        self.cells.append(cell.id)
        if len(self.cells) == self.stop_after:
            raise KeyboardInterrupt


def measure(path, *overrides, **options):
    watcher = Watcher(**options)
    plan = make_plan(load_config(path, overrides))
    done = runner.run_plan(plan, watcher, ["vlmprune", "eval", str(path)])
    return watcher, done, store.load_run(plan.config.output)


def test_cells_are_what_the_contract_says(config):
    watcher, done, run = measure(config)
    assert watcher.loaded == 1
    assert len(done.measured) == len(run.cells) == 4
    assert (run.missing, done.failed) == ([], {})
    assert watcher.samples_seen == [(1, 2), (2, 2)] * 4
    by = {cell["cell"]["id"]: cell for cell in run.cells}
    full = by["scene-llava--none--full--vlmprune_scene_llava_shape--limit-2"]
    fastv = by["scene-llava--fastv--keep-0.25--vlmprune_scene_llava_shape--limit-2"]
    start = "scene-llava--random--keep-0.25--vlmprune_scene_llava_shape"
    first, second = (by[f"{start}--seed-{s}--limit-2"] for s in (0, 1))
    assert full["metric"] == "exact_match"
    assert full["metrics"]["exact_match"]["higher_is_better"] is True
    scores = [sample["score"] for sample in full["samples"]]
    assert full["metrics"]["exact_match"]["value"] == sum(scores) / 2
    assert [sample["doc"] for sample in full["samples"]] == [0, 1]
    for sample in full["samples"]:
        assert sample["score"] == float(sample["answer"] == sample["target"])
        assert sample["cluster"] != str(sample["doc"])  # the picture
        assert (sample["tokens_before"], sample["tokens_after"], sample["layer_average"]) == (256, 256, 256)
        assert sample["ttft_s"] > 0
        assert sample["output_tokens"] >= 1
    assert fastv["summary"]["tokens_after"] == 256
    assert fastv["summary"]["layer_average"] == (2 * 256 + 4 * 64) / 6
    assert first["summary"]["tokens_after"] == 64
    assert (first["cell"]["seed"], second["cell"]["seed"]) == (0, 1)
    assert first["depends"]["limit"] == 2
    assert run.info["cells"] == list(by)
    assert run.info["finished"] is not None
    assert run.info["config_text"] == config.read_text()
    json.dumps(run.cells, allow_nan=False)


def test_a_second_run_measures_nothing_and_loads_nothing(config):
    measure(config)
    watcher, done, run = measure(config)
    assert (watcher.loaded, watcher.cells, done.measured) == (0, [], ())
    assert len(run.cells) == 4


def test_what_changed_is_measured_anew_and_why_is_said(config):
    measure(config)
    plan = make_plan(load_config(config, ["methods.0={name: fastv, keep: 0.25, layer: 3}"]))
    found = survey(plan, plan.config.output)
    assert [name.split("--")[1] for name in found.todo] == ["fastv"]
    assert found.told() == ["3 of 4 cells are measured already", "1 to measure: changed: options.layer none -> 3"]
    watcher, _, run = measure(config, "methods.0={name: fastv, keep: 0.25, layer: 3}")
    assert watcher.cells == list(found.todo)
    assert len(run.cells) == 4
    plan = make_plan(load_config(config, ["limit=1"]))
    found = survey(plan, plan.config.output)
    assert set(found.reasons.values()) == {"not measured yet"}  # in files of their own


def test_a_try_with_a_limit_leaves_the_other_results(config):
    measure(config)
    old = contents(config.parent / "out" / "cells")
    measure(config, "limit=1")
    now = contents(config.parent / "out" / "cells")
    assert len(now) == 8
    assert {name: now[name] for name in old} == old
    watcher, _, run = measure(config)
    assert watcher.cells == []
    assert [len(cell["samples"]) for cell in run.cells] == [2] * 4


def test_without_lmms_eval_nothing_is_said_to_have_changed(config, monkeypatch):
    from vlmprune.eval.lmms import survey as surveys

    measure(config, "controls=false")
    plan = make_plan(load_config(config))
    monkeypatch.setattr(surveys.taskindex, "have_lmms_eval", lambda: False)
    told = survey(plan, plan.config.output).told()
    assert told == [
        "3 to measure: not measured yet",
        "1 to measure: measured, but whether anything changed cannot be told: lmms-eval is not installed here",
    ]


def test_an_interrupted_run_goes_on(config):
    with pytest.raises(KeyboardInterrupt):
        measure(config, stop_after=2)
    run = store.load_run(config.parent / "out")
    assert len(run.cells) == 2
    assert run.info["finished"] is None
    watcher, _, run = measure(config)
    assert len(watcher.cells) == 2
    assert len(run.cells) == 4


def test_a_failed_cell_is_told_and_tried_again_last(config, monkeypatch, capsys):
    real = evaluator.simple_evaluate

    def fails(model, **options):
        if model.method == "none":
            raise RuntimeError("the disk is full")
        return real(model=model, **options)

    monkeypatch.setattr(evaluator, "simple_evaluate", fails)
    assert main(["eval", str(config)]) == 1
    err = capsys.readouterr().err
    assert "1 of 4 cells failed" in err
    assert "RuntimeError: the disk is full" in err
    assert "Traceback" not in err
    run = store.load_run(config.parent / "out")
    assert [cell["error"] for cell in run.cells].count(None) == 3
    assert "Traceback" in (config.parent / "out" / "lmms-eval.log").read_text()

    monkeypatch.undo()
    plan = make_plan(load_config(config, ["methods.1={name: grid, keep: 0.25}"]))
    found = survey(plan, plan.config.output)
    assert [found.reasons[name] for name in found.todo] == ["not measured yet", "failed the last time"]
    assert main(["eval", str(config)]) == 0


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda results: None, "returned no results"),
        (lambda results: results["samples"]["vlmprune_scene_llava_shape"].pop(), "1 of 2 documents were answered"),
        (
            lambda results: results["results"]["vlmprune_scene_llava_shape"].clear(),
            "no metric of this task is a number",
        ),
    ],
)
def test_what_lmms_eval_swallowed_is_a_failure(config, monkeypatch, spoil, words):
    real = evaluator.simple_evaluate

    def swallows(**options):
        results = real(**options)
        return None if spoil(results) is None and words == "returned no results" else results

    monkeypatch.setattr(evaluator, "simple_evaluate", swallows)
    _, done, _ = measure(config, "controls=false")
    assert words in "".join(done.failed.values())


def test_a_task_without_data_fails_once(config, tmp_path, monkeypatch):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text(
        "task: my_task\ndataset_path: parquet\ndataset_kwargs: {data_files: {test: none.parquet}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: x\ndoc_to_target: x\ndoc_to_visual: x\n"
    )
    calls = []
    real = runner.load_task
    monkeypatch.setattr(runner, "load_task", lambda *args: calls.append(args) or real(*args))
    overrides = ["tasks=[my_task, vlmprune_scene_llava_shape]", f"include_path={tmp_path / 'tasks'}", "controls=[none]"]
    _, done, _ = measure(config, *overrides)
    assert len(done.failed) == len(done.measured) == 2
    assert "none.parquet" in next(iter(done.failed.values()))
    assert len(calls) == 2


def test_a_filelock_that_lmms_eval_cannot_use_is_told_before_anything_is_measured(config, monkeypatch, capsys):
    """lmms-eval 0.7.3 imports filelock's private `_api`, which 4.3 has no more: every cell failed with that alone."""
    monkeypatch.setattr(evaluator._enable_reentrant_filelocks, "_patched", False, raising=False)
    monkeypatch.setitem(sys.modules, "filelock._api", None)
    assert main(["eval", str(config)]) == 2
    told = capsys.readouterr().err
    assert "lmms-eval 0.7" in told
    assert "pip install 'filelock<4.3'" in told
    assert not list(config.parent.glob("out/cells/*"))


def test_a_metric_of_the_users_choice(config):
    name = "vlmprune_scene_llava_shape"
    with pytest.raises(Mistakes, match="has no metric 'f1'"):
        measure(config, f"metrics={{{name}: f1}}")


def test_a_metric_that_is_missed_at_run_time_costs_one_cell(config, monkeypatch):
    asked = []
    real = evaluator.simple_evaluate
    monkeypatch.setattr(evaluator, "simple_evaluate", lambda **given: asked.append(1) or real(**given))
    monkeypatch.setattr(plans, "no_metric", lambda *_: None)  # as where a task's metrics cannot be read
    name = "vlmprune_scene_llava_shape"
    _, done, _ = measure(config, f"metrics={{{name}: f1}}")
    assert set(done.failed.values()) == {"this task has no metric 'f1'; it has exact_match"}
    assert (len(done.failed), len(asked)) == (4, 1)


def test_the_estimate(config):
    plan = make_plan(load_config(config))
    found = survey(plan, plan.config.output)
    assert estimate(plan, found, plan.config.output).unknown == 4
    measure(config, "controls=false")
    old = store.read_cell(plan.config.output, "scene-llava--fastv--keep-0.25--vlmprune_scene_llava_shape--limit-2")
    assert old["documents"] > 100
    for limit, samples in (("4", 4), ("null", old["documents"]), ("1000000", old["documents"])):
        plan = make_plan(load_config(config, [f"limit={limit}"]))
        guess = estimate(plan, survey(plan, plan.config.output), plan.config.output)
        assert (guess.measured, guess.unknown) == (1, 0)
        assert guess.seconds == pytest.approx(4 * samples * old["elapsed_s"] / 2)


def environment(**more):
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


def contents(folder):
    return {path.name: (path.stat().st_mtime_ns, json.loads(path.read_text())) for path in folder.glob("*.json")}


DIES = """
import os, signal, sys
from pathlib import Path
from vlmprune.cli import main

number, moment, *words = sys.argv[1:]
real = os.replace

def replace(old, new):
    last = Path(new).parent.name == "cells" and len([*Path(new).parent.glob("*.json")]) == int(number)
    if last and moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    real(old, new)
    if last:
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = replace
main(words)
"""


@pytest.mark.parametrize(("number", "moment", "left"), [(1, "before", 1), (2, "behind", 3)])
def test_killed_while_it_writes(config, tmp_path, number, moment, left):
    """With so many results there, right before or behind the step that puts another one beside them."""
    more = ["--set", "controls=true", "--set", "seeds=[0, 1, 2]"]
    command = [sys.executable, "-P", "-c", DIES, str(number), moment, "eval", str(config), *more]
    cells = tmp_path / "out" / "cells"
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == -signal.SIGKILL, done.stderr
    there = contents(cells)  # which reads every file as JSON
    assert len(there) == left
    assert len(list(cells.glob(".writing-*"))) == (moment == "before")
    assert done.stderr.count("exact_match") == number
    assert main(["eval", str(config), *more]) == 0
    now = contents(cells)
    assert {name: now[name] for name in there} == there
    assert not store.load_run(tmp_path / "out").missing
    assert not list(cells.glob(".writing-*"))


def answers(folder):
    same = ("doc", "cluster", "score", "answer", "target", "tokens_before", "tokens_after", "layer_average")
    return {
        cell["cell"]["id"]: (
            cell["key"],
            cell["metrics"],
            [[sample[word] for word in same] for sample in cell["samples"]],
        )
        for cell in store.load_run(folder).cells
    }


def test_two_processes_give_the_results_of_one(config, tmp_path):
    more = ["--set", "limit=5"]
    assert main(["eval", str(config), *more]) == 0
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "-m", "vlmprune", "eval", str(config), *more]
    command = [*launch, "--set", f"output={tmp_path / 'two'}"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment(ACCELERATE_USE_CPU="true"),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert store.load_run(tmp_path / "two").info["processes"] == 2
    assert answers(tmp_path / "two") == answers(tmp_path / "out")
    assert done.stderr.count("loading scene-llava ...") == 1  # the second process keeps quiet
