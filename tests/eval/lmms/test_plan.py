"""From a config to cells: what is multiplied out, what is left out, what is refused, and what keys depend on."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import tiny_folders

from vlmprune import spec
from vlmprune.eval.config.schema import load_config
from vlmprune.eval.lmms import fingerprints, store
from vlmprune.eval.lmms.plan import make_plan
from vlmprune.eval.lmms.run import ledger
from vlmprune.eval.lmms.survey import survey
from vlmprune.eval.lmms.taskindex import local_data
from vlmprune.methods import ToDRE
from vlmprune.parts.facts import ModelFacts
from vlmprune.yamls.tree import Mistakes

pytest.importorskip("lmms_eval")

BASE = """\
model: {model}
name: tiny
tasks: [vlmprune_scene_llava_shape]
methods: {methods}
"""


SHAPE = "vlmprune_scene_llava_shape"
PUBLISHED = f"keep: 4\npublished: [{{{{method: fopru, task: {SHAPE}, value: 1, source: s, definition: d, {{}}}}}}]"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny models without their weights: whatever works here read config.json only."""
    root = tmp_path_factory.mktemp("models")
    made = {
        "llava": tiny_folders.save(root / "llava"),
        "next": tiny_folders.save(root / "next", "llava_next"),
        "siglip": tiny_folders.save(root / "siglip", tower="siglip"),
    }
    for folder in made.values():
        (folder / "model.safetensors").unlink()
    return made


@pytest.fixture
def plan(folders, tmp_path):
    """`plan("[fopru]", "keep: 4", model="next")`: lines after the methods, and overrides."""

    def make(methods, *more, model="llava", overrides=()):
        path = tmp_path / "my.yaml"
        path.write_text(BASE.format(model=folders.get(model, model), methods=methods) + "\n".join(more) + "\n")
        return make_plan(load_config(path, overrides))

    return make


@pytest.fixture
def mistakes(plan, tmp_path):
    def make(*args, **options):
        with pytest.raises(Mistakes) as error:
            plan(*args, **options)
        return [(where.rpartition(":")[2], what) for where, what in error.value.found]

    return make


def variants(plan, label=None):
    return [(c.label, c.budget, c.seed) for _, c in plan.cells if label in (None, c.label)]


@pytest.mark.parametrize(
    ("methods", "model", "words"),
    [
        (
            "[[{name: tome, keep: 0.5}, {name: pitome, keep: 0.5}]]",
            "llava",
            "both take or merge tokens in, in front of or behind the vision tower",
        ),
        ("[[{name: tome, keep: 0.5}, {name: fopru, keep: 4}]]", "llava", "looks at that tower"),
        ("[[{name: globalcom2, parity: released, keep: 0.5}, {name: random, keep: 4}]]", "next", "order of its own"),
    ],
)
def test_methods_that_cannot_share_a_model(mistakes, methods, model, words):
    """`patch` refuses them, and so does every command before it loads weights."""
    ((_, what),) = mistakes(methods, "keep: 0.5", model=model)
    assert words in what


def test_null_is_a_value(plan):
    """It was thrown away once, and full ToDRE was measured as its first stage."""
    made = plan("[todre, {name: todre, tau: null, label: one}]", "keep: 4", "controls: false")
    both, one = [cell for _, cell in made.cells]
    assert spec.build(one.method, one.arguments) == [ToDRE(keep=4, tau=None)] != spec.build(both.method, both.arguments)
    assert spec.build(both.method, both.arguments) == [ToDRE(keep=4)]
    assert made.jobs[0].key(both) != made.jobs[0].key(one)


def test_a_pattern_of_tasks_is_told(mistakes):
    override = ["tasks=[vlmprune_scene_llava_sh*, vlmprune_scene_llava_shap]"]
    (_, pattern), (_, word) = mistakes("[fopru]", "keep: 4", overrides=override)
    assert "Patterns are not taken: name the tasks or a group (vlmprune_scene_llava_shape)" in pattern
    assert "Did you mean" not in pattern
    assert "Did you mean 'vlmprune_scene_llava_shape'" in word


def test_everything_is_multiplied_out(plan):
    made = plan("[fopru, {name: todre, tau: null, label: one}]", "keep: [4, 0.5]", "average: 0.25", "seeds: [7, 8]")
    budgets = [{"keep": 4}, {"keep": 0.5}, {"average": 0.25}]
    assert variants(made, "none") == [("none", None, None)]
    assert variants(made, "one") == [("one", budget, None) for budget in budgets]
    assert variants(made, "random") == [("random", budget, seed) for budget in budgets for seed in (7, 8)]
    assert len(made.cells) == 1 + 3 + 3 + 6 + 3 + 3
    assert made.cells[0][1].id == "tiny--none--full--vlmprune_scene_llava_shape"
    ids = [cell.id for _, cell in made.cells]
    assert "tiny--random--keep-0.5--vlmprune_scene_llava_shape--seed-8" in ids
    (cell,) = [c for _, c in made.cells if c.id == "tiny--one--average-0.25--vlmprune_scene_llava_shape"]
    assert (cell.method, cell.options, cell.control) == ("todre", {"tau": None}, False)
    assert cell.arguments == {"tau": None, "average": 0.25}
    assert all(c.control == (c.label in ("none", "random", "grid", "pool")) for _, c in made.cells)


def test_one_token_and_all_tokens_are_two_budgets(plan):
    assert variants(plan("[fopru]", "keep: [1, 1.0]"), "fopru") == [
        ("fopru", {"keep": 1}, None),
        ("fopru", {"keep": 1.0}, None),
    ]
    ids = [cell.id for _, cell in plan("[fopru]", "keep: [1, 1.0]").cells]
    assert len(set(ids)) == len(ids)


def test_methods_with_other_budgets(plan):
    made = plan(
        "[{name: transprune, own_budget: true, prune_layers: [7, 9, 20]}, {name: fopru, keep: 8}, "
        "{name: [{name: fopru, keep: 8}, {name: fastv, keep: 4}], label: two}]",
        "keep: 0.5",
        model="next",
    )
    assert variants(made, "transprune") == [("transprune", None, None)]
    assert variants(made, "fopru") == [("fopru", {"keep": 8}, None)]
    assert variants(made, "two") == [("two", None, None)]
    assert variants(made, "grid") == [("grid", {"keep": 0.5}, None), ("grid", {"keep": 8}, None)]
    (cell,) = [c for _, c in made.cells if c.label == "two"]
    assert (cell.method, cell.arguments) == ("fopru+fastv", {"fopru.keep": 8, "fastv.keep": 4})
    assert cell.id == "tiny--two--own--vlmprune_scene_llava_shape"


def test_what_is_there_only_when_a_method_runs_is_not_asked_for_before(plan):
    """CDPruner asks a CLIP model and the processor: neither is loaded to make a plan."""
    made = plan("[{name: cdpruner, clip: nobody/nothing, keep: 4}]", "controls: false")
    assert variants(made) == [("cdpruner", {"keep": 4}, None)]


def test_settings_of_the_image_processor_are_in_the_keys(plan):
    keys = [
        {job.key(cell) for job, cell in plan("[fopru]", "keep: 4", *more).cells}
        for more in ((), ("image_processor: {}",), ("image_processor: {max_pixels: 400}",), ("plain_pictures: false",))
    ]
    assert keys[0] == keys[1] == keys[3]
    assert not keys[0] & keys[2]


def test_controls_without_a_budget_are_left_out_with_a_reason(plan):
    made = plan("[{name: fastv, own_budget: true}]")
    assert [c.label for _, c in made.cells] == ["none", "fastv"]
    assert [(s["label"], s["budget"]) for s in made.skipped] == [("random", None), ("grid", None), ("pool", None)]
    assert "no budget" in made.skipped[0]["reason"]


def test_seeds_of_a_method(plan, mistakes):
    made = plan("[{name: todre, pivot: random, seeds: [1, 2]}]", "keep: 4")
    assert variants(made, "todre") == [("todre", {"keep": 4}, 1), ("todre", {"keep": 4}, 2)]
    ((line, what),) = mistakes("[{name: fopru, seeds: [1]}]", "keep: 4")
    assert line == "4"
    assert "takes no seed" in what
    ((_, what),) = mistakes("[{name: todre, seed: 1, seeds: [1]}]", "keep: 4")
    assert "not both" in what


def test_a_budget_that_one_method_cannot_meet_is_left_out(plan):
    made = plan("[fopru, fastv]", "average: [0.75, 0.1]")
    assert variants(made, "fastv") == [("fastv", {"average": 0.75}, None)]
    assert len(variants(made, "fopru")) == 2
    ((left),) = made.skipped
    assert (left["label"], left["budget"]) == ("fastv", {"average": 0.1})
    assert "average=0.1 cannot be met" in left["reason"]


@pytest.mark.parametrize(
    ("methods", "more", "model", "line", "words"),
    [
        ("[fopru, {name: fastv, average: [0.75, 0.1]}]", "keep: 4", "llava", "4", "average=0.1 cannot be met"),
        ("[fopru, fastv]", "average: 0.1", "llava", "4", "fastv: average=0.1 cannot be met"),
        ("[fopru, vtc_cls]", "keep: 4", "siglip", "4", "this tower has none"),
        ("[{name: fopru, score: cls}]", "keep: 4", "siglip", "4", "use score='received'"),
        ("[globalcom2]", "keep: 4", "llava", "4", "llava models have a single view"),
        ("[fopru]", "", "llava", "4", "fopru needs keep="),
        ("[fopro]", "keep: 4", "llava", "4", "Did you mean 'fopru'?"),
        ("[{name: fopru, stratagy: row}]", "keep: 4", "llava", "4", "Did you mean 'strategy'?"),
        ("[{name: fopru, strategy: column}]", "keep: 4", "llava", "4", "strategy='column'"),
        ("[{name: fastv, layer: 9}]", "keep: 4", "llava", "4", "layer=9 is out of range"),
        ("[{name: atp, keep: 4}]", "", "llava", "4", "average that its weights were trained for"),
        ("[atp]", "keep: 4", "llava", "4", "atp needs trained modules"),
        ("[[fopru, none]]", "", "llava", "4", "cannot be combined"),
        ("[[todre, fastv]]", "keep: 4", "llava", "4", "todre needs keep="),
        ("[[{name: tome, keep: 4}, {name: fopru, keep: 4}]]", "", "llava", "4", "merges tokens inside"),
        ("[[{name: tome, keep: 4}, {name: pitome, keep: 4}]]", "", "llava", "4", "both take or merge tokens in"),
        ("[fopru]", "keep: 4", "scene-lava", "1", "Did you mean 'scene-llava'?"),
        ("[fopru]", "keep: 4", "/no/such/folder", "1", "no such folder"),
        ("[fopru]", "keep: 4\ntemplate: no.jinja", "llava", "6", "no file 'no.jinja'"),
        ("[fopru]", "keep: 4\ninclude_path: [/no/such]", "llava", "3", "no folder '/no/such'"),
        (
            "[fopru]",
            "keep: 4\npublished: [{method: none, task: gqa, metric: m, value: 1, source: s, definition: d}]",
            "llava",
            "6",
            "'gqa' is not run here",
        ),
        ("[fopru]", f"keep: 4\nmetrics: {{{SHAPE}: exact_mach}}", "llava", "6", "Did you mean 'exact_match'?"),
        (
            "[fopru]",
            PUBLISHED.format("metric: nope, keep: 4"),
            "llava",
            "6",
            "no metric 'nope'. It has exact_match",
        ),
        (
            "[fopru]",
            PUBLISHED.format("metric: exact_match, keep: 3"),
            "llava",
            "6",
            "is published at keep 3, and run",
        ),
        ("[fopru]", PUBLISHED.format("metric: exact_match"), "llava", "6", "published at no budget, and run at keep 4"),
        (
            "[fopru]",
            PUBLISHED.format("metric: exact_match, keep: 4, model: tinny"),
            "llava",
            "6",
            "no run. Did you mean 'tiny'?",
        ),
    ],
)
def test_what_cannot_be(mistakes, methods, more, model, line, words):
    found = mistakes(methods, more, model=model)
    assert [where for where, what in found if words in what] == [line]


def test_tasks(plan, mistakes):
    ((_, what),) = mistakes("[fopru]", "keep: 4", overrides=["tasks=[vlmprune_scene_llava_shap]"])
    assert "Did you mean 'vlmprune_scene_llava_shape'?" in what
    made = plan("[]", overrides=["tasks=[vlmprune_scene_llava_unseen, vlmprune_scene_llava_shape]"])
    tasks = {c.task: c.group for _, c in made.cells}
    assert list(tasks)[-1] == "vlmprune_scene_llava_shape"
    assert tasks["vlmprune_scene_llava_shape"] is None
    assert tasks["vlmprune_scene_llava_unseen_colour"] == "vlmprune_scene_llava_unseen"
    assert len(tasks) == 6


def test_metrics_of_groups_and_of_lmms_evals_own_tasks(plan, mistakes):
    group = "tasks=[vlmprune_scene_llava_unseen, mme, pope]"
    good = "metrics={vlmprune_scene_llava_unseen: exact_match, mme: mme_cognition_score, pope: pope_f1_score}"
    job = plan("[]", overrides=[group, good]).jobs[0]
    assert job.tasks["mme"]["metric"] == "mme_cognition_score"
    assert job.tasks["vlmprune_scene_llava_unseen_where"]["metric"] == "exact_match"
    bad = "metrics={vlmprune_scene_llava_unseen: acc, mme: mme_perception, pope: pope_f1}"
    told = "\n".join(what for _, what in mistakes("[]", overrides=[group, bad]))
    assert "vlmprune_scene_llava_unseen_where has no metric 'acc'. It has exact_match." in told
    assert "mme has no metric 'mme_perception'. Did you mean 'mme_perception_score'?" in told
    assert "pope has no metric 'pope_f1'. Did you mean 'pope_f1_score'? It has pope_accuracy" in told


def test_an_odd_limit_is_refused_for_mme_alone(plan, mistakes):
    ((where, what),) = mistakes("[]", "limit: 3", overrides=["tasks=[gqa, mme]"])
    assert where == "5"
    assert "mme scores pairs of questions" in what
    assert plan("[]", "limit: 3", overrides=["tasks=[mmerealworld_lite]"]).cells
    assert plan("[]", "limit: 4", overrides=["tasks=[mme]"]).cells


def test_what_may_not_be_meant_is_noted(plan):
    made = plan("null", "keep: 4", "device: cuda:99")
    assert "tiny: no methods are given, so only the controls are run: none, random, grid, pool." in made.notes
    assert any("cannot be run on this machine: there is no device 'cuda:99'" in note for note in made.notes)
    assert plan("[fopru]", "keep: 4", "device: cpu").notes == ()


def test_published_numbers_of_several_runs(folders, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(
        f"keep: 4\nmethods: [fopru]\ntasks: [{SHAPE}]\nruns:\n  - {{model: {folders['llava']}}}\n"
        f"  - {{model: {folders['next']}}}\npublished:\n  - {{method: none, model: next, task: {SHAPE}, value: 1, "
        "metric: exact_match, source: s, definition: d}\n"
    )
    assert len(make_plan(load_config(path)).jobs) == 2
    assert make_plan(load_config(path, ["controls=false"])).cells  # without the full model, its numbers may stay


def test_results_with_a_limit_have_files_of_their_own(plan):
    (whole,), (some,) = ([c for _, c in plan("[]", "seeds: [3]", "keep: 4", *more).cells if c.label == "random"]
                         for more in ((), ("limit: 20",)))  # fmt: skip
    assert some.id == f"{whole.id}--limit-20" == f"tiny--random--keep-4--{SHAPE}--seed-3--limit-20"


def test_lmms_evals_own_tasks_and_groups(plan):
    made = plan("[]", overrides=["tasks=[gqa, docvqa]"])
    assert [c.task for _, c in made.cells] == ["gqa", "docvqa_val", "docvqa_test"]


def test_tasks_of_the_user(plan, tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text("task: my_task\ndataset_path: x\n")
    overrides = ["tasks=[my_task]", f"include_path={tmp_path / 'tasks'}"]
    job = plan("[]", overrides=overrides).jobs[0]
    before = job.key(job.cells[0])
    (tmp_path / "tasks" / "mine.yaml").write_text("task: my_task\ndataset_path: y\n")
    job = plan("[]", overrides=overrides).jobs[0]
    assert job.key(job.cells[0]) != before


def test_without_lmms_eval_tasks_stay_unchecked(plan, monkeypatch):
    from vlmprune.eval.lmms import taskindex

    monkeypatch.setattr(taskindex, "have_lmms_eval", lambda: False)
    made = plan("[fopru]", "keep: 4", overrides=["tasks=[whatever]"])
    assert {c.task for _, c in made.cells} == {"whatever"}
    assert "pip install vlmprune[eval]" in made.notes[0]


def test_an_lmms_eval_that_lacks_a_requirement(plan, monkeypatch):
    from vlmprune.eval.lmms import taskindex
    from vlmprune.runtime.errors import UserError

    taskindex.task_manager.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "lmms_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pytz", None)
    with pytest.raises(UserError, match=r"installed and cannot be imported: .*pytz.* pip install pytz .*or all"):
        plan("[fopru]", "keep: 4")


def keys(plan):
    return {cell.id: job.key(cell) for job, cell in plan.cells}


def test_keys_change_with_what_a_result_depends_on_and_nothing_else(plan, folders, tmp_path, monkeypatch):
    more = ("keep: [4, 0.5]", "limit: 4")
    old = keys(plan("[fopru, fastv]", *more))
    assert keys(plan("[fopru, fastv]", *more)) == old
    for same in ("output=elsewhere", "seeds=[0, 1]", "methods.2=grid", "keep=[0.5]"):
        new = keys(plan("[fopru, fastv]", *more, overrides=[same]))
        assert all(key == old[name] for name, key in new.items() if name in old and "grid" not in name)
    for other in ("batch_size=2", "dtype=float16", "device=cuda", "generation.max_new_tokens=3"):
        new = keys(plan("[fopru, fastv]", *more, overrides=[other]))
        assert set(new) == set(old)
        assert not set(new.values()) & set(old.values())
    new = keys(plan("[{name: fopru, strategy: row}, fastv]", *more))
    assert {name for name in old if new[name] != old[name]} == {name for name in old if "--fopru--" in name}

    monkeypatch.setattr(fingerprints, "versions", lambda: {"torch": "9"})
    assert not set(keys(plan("[fopru, fastv]", *more)).values()) & set(old.values())


def test_another_models_files_change_the_keys(plan, folders, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folders["llava"], copy)
    old = keys(plan("[fopru]", "keep: 4"))
    assert keys(plan("[fopru]", "keep: 4", model=str(copy))) == old  # the same model elsewhere
    (copy / "model.safetensors").write_bytes(b"x")
    assert not set(keys(plan("[fopru]", "keep: 4", model=str(copy))).values()) & set(old.values())


def told(plan, folder):
    """Why cells are measured anew."""
    return {*survey(plan, folder).reasons.values()}


@pytest.fixture
def measured(tmp_path):
    """`measured(plan)`: a folder with a result for every cell."""

    def write(made):
        sample = {"doc": 0, "cluster": "0", "score": 1.0, "target": "x"}
        summary = dict.fromkeys(("tokens_before", "tokens_after", "layer_average"), 4.0)
        summary |= dict.fromkeys(("ttft_s", "decode_tokens_per_s", "peak_memory_bytes"))
        for job, cell in made.cells:
            about = {"format": store.FORMAT, "cell": asdict(cell), "key": job.key(cell), "depends": job.depends(cell)}
            metric = {"metrics": {"m": {"value": 1.0}}, "metric": "m", "samples": [sample], "summary": summary}
            store.write_cell(tmp_path / "done", about | metric | {"elapsed_s": 1.0, "error": None})
        return tmp_path / "done"

    return write


def test_results_are_kept_until_something_they_depend_on_has_another_content(plan, measured, tmp_path, monkeypatch):
    """At the same path and the same version."""
    template, tasks, data = tmp_path / "chat.jinja", tmp_path / "tasks", tmp_path / "data"
    tasks.mkdir()
    data.mkdir()
    template.write_text("one")
    (data / "docs.json").write_text("[]")
    (data / "shared.yaml").write_text("output_type: generate_until\n")
    (tasks / "mine.yaml").write_text(
        f"include: {data}/shared.yaml\ntask: my_task\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}/*.json}}}}\n"
    )
    more = ("keep: 4", f"template: {template}")
    make = lambda: plan("[fopru]", *more, overrides=["tasks=[my_task]", f"include_path={tasks}"])  # noqa: E731
    folder = measured(make())
    assert told(make(), folder) == set()
    for path, what in (
        (template, "the chat template"),
        (data / "docs.json", "the task's data"),
        (data / "more.json", "the task's data"),
        (data / "shared.yaml", "the task's YAML"),
    ):
        old = path.read_text() if path.exists() else None
        path.write_text("# two\noutput_type: generate_until_multi_round\n")
        assert told(make(), folder) == {f"changed: {what}"}, path
        path.unlink() if old is None else path.write_text(old)
    assert told(make(), folder) == set()
    plainly = plan("[fopru]", *more, "plain_pictures: true", overrides=["tasks=[my_task]", f"include_path={tasks}"])
    assert told(plainly, folder) == {"changed: how pictures are read"}
    (tasks / "utils.py").write_text("x = 1")
    assert told(make(), folder) == {"changed: the task's files"}
    (tasks / "utils.py").unlink()
    monkeypatch.setattr(fingerprints, "library", lambda: "edited")
    assert told(make(), folder) == {"changed: vlmprune's code"}


def test_a_data_set_that_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.parquet").write_text("")
    assert local_data({"dataset_path": "set"}) == [tmp_path / "set" / "a.parquet"]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"dataset_path": ""},
        {"dataset_path": "lmms-lab/GQA", "dataset_kwargs": {}},
        {"dataset_path": "json", "dataset_kwargs": {"data_files": "https://host/set/a.parquet"}},
    ],
)
def test_a_data_set_that_is_not_on_this_disk(config):
    assert local_data(config) == []


def test_a_template_at_home(plan, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "chat.jinja").write_text("one")
    assert plan("[fopru]", "keep: 4", "template: ~/chat.jinja").jobs[0].shared["template"]


def test_results_of_before_the_code_was_hashed_are_measured_anew(plan, measured):
    made = plan("[fopru]", "keep: 4")
    folder = measured(made)
    for path in (folder / "cells").iterdir():
        cell = json.loads(path.read_text())
        del cell["depends"]["library"]
        cell["key"] = "old"
        path.write_text(json.dumps(cell))
    assert told(made, folder) == {"changed: vlmprune's code"}


def test_an_edited_method_changes_its_keys_only(plan, monkeypatch):
    old = keys(plan("[fopru, fastv]", "keep: 4"))
    real = fingerprints.code_of
    monkeypatch.setattr(fingerprints, "code_of", lambda path: "edited" if path.endswith("fopru.py") else real(path))
    new = keys(plan("[fopru, fastv]", "keep: 4"))
    assert {name for name in old if new[name] != old[name]} == {name for name in old if "--fopru--" in name}


def test_large_files_are_told_apart_by_size_and_time(tmp_path, monkeypatch):
    import os

    monkeypatch.setattr(fingerprints, "HASHED", 10)
    (tmp_path / "a").write_bytes(b"x" * 20)
    before = fingerprints.files(tmp_path)
    os.utime(tmp_path / "a", ns=(1, 1))
    assert fingerprints.files(tmp_path) != before


def test_names_that_would_share_a_file(mistakes):
    ((_, what),) = mistakes("[{name: fopru, label: a/b}, {name: fopru, label: a_b}]", "keep: 4")
    assert "would share the file" in what


def test_facts_are_those_of_the_loaded_model(tiny_model):
    from vlmprune.patches import family_of

    for options in ({"family": "llava"}, {"family": "llava_next", "text": "qwen2"}, {"tower": "siglip"}):
        model = tiny_model(**options)
        family = family_of(model)
        facts = family.facts(family.inner(model))
        assert isinstance(facts, ModelFacts)
        assert fingerprints.facts_of(model.config, "x") == facts


def test_no_model_leaves_what_depends_on_it_unchecked(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(BASE.format(model="some/where", methods="[globalcom2, fastv]") + "average: [0.1]\n")
    assert len(make_plan(load_config(path), look_at_model=False).cells) == 1 + 2 + 3 + 2
    path.write_text(BASE.format(model="some/where", methods="[fopro]") + "average: [0.1]\n")
    with pytest.raises(Mistakes, match="unknown method"):
        make_plan(load_config(path), look_at_model=False)


def test_the_ledger(plan):
    made = plan(
        "[fopru]",
        "keep: 0.5",
        "published:",
        "  - {method: fopru, keep: 0.5, task: vlmprune_scene_llava_shape, metric: exact_match, value: 3, source: s,",
        "     definition: d}",
    )
    (entry,) = ledger(made.jobs[0].setting)
    assert entry == {
        "model": "tiny",
        "method": "fopru",
        "keep": 0.5,
        "task": "vlmprune_scene_llava_shape",
        "metric": "exact_match",
        "value": 3.0,
        "source": "s",
        "definition": "d",
    }
    json.dumps(entry)


def test_the_weights_are_not_read(plan, folders):
    assert not (Path(folders["llava"]) / "model.safetensors").exists()
    assert plan("[fopru]", "keep: 4").cells


def test_downsample_is_planned_where_pictures_are_packed(plan):
    """The processor makes them smaller there; what merges in such a tower is refused."""
    made = plan("[fopru]", "keep: 0.25", "controls: [none, downsample]", model="scene-qwen")
    assert {cell.label for _, cell in made.cells} == {"none", "fopru", "downsample"}
    with pytest.raises(Mistakes, match="tome changes what the vision tower reads"):
        plan("[tome]", "keep: 0.25", "controls: [none, downsample]", model="scene-qwen")
