"""The packaged tasks are the testbed's questions, scored as the testbed scores them, and the suites name real tasks."""

import importlib.util
from pathlib import Path

import harness
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from testbed import scoring
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmprune
from vlmprune.eval import tasks, testbed
from vlmprune.eval.lmms.model import VlmPrune
from vlmprune.eval.testbed.words import CATEGORIES

ROOT = Path(__file__).resolve().parents[2]
SUITES = sorted((ROOT / "configs" / "suites").glob("*.yaml"))


def the_script():
    place = ROOT / "scripts" / "make_testbed_tasks.py"
    spec = importlib.util.spec_from_file_location("make_testbed_tasks", place)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.mark.parametrize("split", testbed.SPLITS)
def test_the_parquet_holds_the_questions(split):
    file = Path(tasks.path()) / f"{split}.parquet"
    rows = pq.read_table(file).to_pylist()
    for row, record in zip(rows, testbed.questions(split), strict=True):
        assert row["image"] == {"bytes": record.picture, "path": None}
        for name in ("id", "picture_id", "category", "question", "answer"):
            assert row[name] == getattr(record, name)


def test_the_data_is_small():
    files = list(Path(tasks.path()).glob("*.parquet"))
    assert len(files) == len(testbed.SPLITS)
    assert sum(file.stat().st_size for file in files) < 7 * 2**20  # a picture once, not once a question


def test_the_files_are_what_the_script_writes(tmp_path, monkeypatch):
    script = the_script()
    monkeypatch.setattr("sys.argv", ["make_testbed_tasks.py", "--out", str(tmp_path)])
    script.main()
    for kind in ("*.yaml", "*.parquet"):
        here = {file.name: file for file in Path(tasks.path()).glob(kind)}
        there = {file.name: file for file in tmp_path.glob(kind)}
        assert set(here) == set(there)
        for name in here:
            if kind == "*.yaml":
                assert here[name].read_text() == there[name].read_text()
            else:  # bytes depend on the version of pyarrow
                assert pq.read_table(here[name]).equals(pq.read_table(there[name]))


def test_a_task_for_every_category_and_a_group_for_every_split():
    manager = harness.packaged()
    assert set(manager.all_groups) == set(tasks.GROUPS.values())
    assert set(manager.all_subtasks) == {name for split in tasks.GROUPS for name in tasks.names(split)}
    assert [name.rsplit("_", 1)[1] for name in tasks.names("sparse")] == list(CATEGORIES)
    loaded = manager.load_task_or_group(list(tasks.GROUPS.values()), "chat")
    found = {group.group: members for group, members in loaded.items()}
    for split, group in tasks.GROUPS.items():
        members, records = found[group], testbed.questions(split)
        assert sum(len(member.test_docs()) for member in members.values()) == len(records)
        for name, member in members.items():
            category = name.removeprefix(f"{group}_")
            assert [doc["id"] for doc in member.test_docs()] == [r.id for r in records if r.category == category]
            assert int(testbed.VERSION) == member.VERSION
            (first,) = [r for r in records if r.id == member.test_docs()[0]["id"]]
            assert np.array_equal(member.test_docs()[0]["image"], first.image)


@pytest.mark.parametrize(
    ("name", "split", "method", "options"),
    [
        ("scene-llava", "sparse", "none", {}),
        ("scene-llava", "crowded", "random", {"keep": 0.1, "seed": 1}),
        ("scene-llava-next", "next", "globalcom2", {"keep": 0.25}),
    ],
)
def test_scores_are_those_of_the_testbed(name, split, method, options):
    """What `scripts/eval_testbed.py` computes, on the first questions of every category."""
    each = 5 if split == "next" else 9
    group = tasks.GROUPS[split]
    lm = VlmPrune(name, method=method, **options, batch_size=8, device="cpu")
    result = harness.evaluate(lm, [group], limit=each)
    by_category = {c: [r for r in testbed.questions(split) if r.category == c][:each] for c in CATEGORIES}
    records = [r for some in by_category.values() for r in some]
    model = AutoModelForImageTextToText.from_pretrained(testbed.path(name), dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(testbed.path(name))
    if method != "none":
        vlmprune.patch(model, method, **options)
    said = scoring.answer(model, processor, records)
    table = scoring.by_category(records, scoring.right(records, said))
    assert [a for c in CATEGORIES for a in harness.answers(result, f"{group}_{c}")] == said
    for category in CATEGORIES:
        assert result["results"][f"{group}_{category}"]["exact_match,none"] == pytest.approx(table[category])
    assert result["groups"][group]["exact_match,none"] == pytest.approx(table["all"])
    assert 0.2 < table["all"] < 1


@pytest.mark.parametrize("file", SUITES, ids=lambda file: file.stem)
def test_suites_name_tasks_that_there_are_and_no_paid_judge(file):
    suite = yaml.safe_load(file.read_text())
    assert set(suite) == {"name", "description", "tasks"}
    assert suite["name"] == file.stem
    assert file.read_text().startswith("# ")  # what it is, and whose
    assert len(set(suite["tasks"])) == len(suite["tasks"]) > 1
    manager = harness.builtin()
    for task in suite["tasks"]:
        assert task in manager.all_subtasks, f"lmms-eval has no task {task}"
        source = manager._get_yaml_path(task)
        metrics = [metric["metric"] for metric in manager._get_config(task)["metric_list"]]
        assert task.endswith("_static") or not any("gpt" in metric for metric in metrics), source


def test_a_suite_for_each_of_the_six_methods():
    assert {"fopru", "vtc-cls", "globalcom2", "todre", "transprune", "atp"} <= {file.stem for file in SUITES}
