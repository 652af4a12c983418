"""The packaged tasks are the testbed's questions, scored as the testbed scores them, and the suites name real tasks."""

import importlib.util
from collections import Counter
from pathlib import Path

import harness
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from testbed import asking, packed, scoring
from testbed import split as splits
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmprune
from vlmprune.eval import tasks, testbed
from vlmprune.eval.lmms.model import VlmPrune
from vlmprune.eval.tasks import utils
from vlmprune.eval.testbed.words import CAPTION, CATEGORIES, DESCRIBE, VOCABULARY

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
    assert {file.stem for file in files} == {*testbed.SPLITS, "captions"}
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
    by_category = {name for split in tasks.GROUPS for name in tasks.names(split)}
    whole = {f"{group}_mixed" for group in tasks.GROUPS.values()}
    absent = {f"{group}_absent" for split, group in tasks.GROUPS.items() if split != "unseen"}
    assert set(manager.all_subtasks) == by_category | whole | absent | {*tasks.CAPTIONS}
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


def test_mixed_tasks_ask_one_question_about_every_picture_first():
    found = harness.packaged().load_task_or_group([f"{group}_mixed" for group in tasks.GROUPS.values()], "chat")
    for split, group in tasks.GROUPS.items():
        docs = found[f"{group}_mixed"].test_docs()
        assert docs["id"] == [record.id for record in tasks.mixed(split)]
        assert sorted(docs["id"]) == sorted(record.id for record in testbed.questions(split))
        pictures = len(set(docs["picture_id"]))
        assert docs["picture_id"][:pictures] == sorted(set(docs["picture_id"]))


@pytest.mark.parametrize("split", testbed.SPLITS)
def test_the_first_questions_of_a_mixed_task_are_as_many_of_every_category(split):
    there = {record.category for record in testbed.questions(split)}
    for count in (40, 50, 60):
        first = Counter(record.category for record in tasks.mixed(split)[:count])
        assert set(first) == there
        assert max(first.values()) - min(first.values()) <= 2, first


def test_categories_in_turns_meet_what_recurs_among_pictures():
    """Pictures whose sizes recur after nine, of which some have no digit: no size is left to one category."""
    kinds = [[one for one in CATEGORIES if one != "digit" or number % 3] for number in range(189)]
    pairs = [(number, one) for number, mine in enumerate(kinds) for one in mine]
    order = tasks.in_turns([f"{number:03d}" for number, _ in pairs], [one for _, one in pairs])
    assert sorted(order) == list(range(len(pairs)))
    first = [pairs[place] for place in order[:189]]
    assert [number for number, _ in first] == list(range(189))
    assert {count for _, count in Counter(one for _, one in first).items()} <= {26, 27, 28}
    for category in CATEGORIES:
        sizes = {number % 9 for number, one in first if one == category}
        assert len(sizes) >= (6 if category == "digit" else 8), category


def test_absent_tasks_ask_about_what_is_not_there_once_a_picture():
    found = harness.packaged().load_task_or_group(
        [f"{group}_absent" for split, group in tasks.GROUPS.items() if split != "unseen"], "chat"
    )
    counts = {}
    for split, group in tasks.GROUPS.items():
        records = tasks.absent(split)
        assert {(record.category, record.answer) for record in records} <= {("exist", "no")}
        assert len({record.picture_id for record in records}) == len(records)
        assert len(records) == sum(
            record.category == "exist" and record.answer == "no" for record in testbed.questions(split)
        )
        if records:
            assert found[f"{group}_absent"].test_docs()["id"] == [record.id for record in records]
            counts[split] = len(records)
    assert counts == {"sparse": 90, "crowded": 26, "next": 40, "qwen": 45}


def test_captions_are_of_three_things_or_four_and_say_what_is_there():
    found = harness.packaged().load_task_or_group([*tasks.CAPTIONS], "chat")
    short, long = (found[name] for name in tasks.CAPTIONS)
    docs = short.test_docs()
    assert docs["picture_id"] == long.test_docs()["picture_id"]
    assert len(docs) == len(set(docs["picture_id"])) == 120
    for doc in docs:
        split, number = doc["picture_id"].split("-")
        scene = splits.test_scene(split, splits.SIZES[split][2] + int(number))
        assert doc["answer"] == asking.caption(scene)
        assert 2 < len(scene.things) < 5
        told = asking.description(scene)
        assert utils.named(told) == utils.named(doc["answer"]) == {thing.pair for thing in scene.things}
        assert 60 <= len(told.split()) < packed.LONG_LENGTH - 8  # the question and the end come on top
        assert set(told.split()) <= set(VOCABULARY)
    assert [task.doc_to_text(docs[0]) for task in (short, long)] == [CAPTION, DESCRIBE]
    pictures = {record.picture_id: record for split in ("sparse", "crowded") for record in testbed.questions(split)}
    assert np.array_equal(docs[0]["image"], pictures[docs[0]["picture_id"]].image)


def test_the_long_model_describes_at_length_and_random_tokens_cost_it_things():
    found = {}
    for method, options in (("none", {}), ("random", {"keep": 0.05})):
        lm = VlmPrune("scene-llava-long", method=method, **options, batch_size=6, device="cpu")
        result = harness.evaluate(lm, ["vlmprune_scene_llava_long"], limit=6)
        found[method] = result["results"]["vlmprune_scene_llava_long"]["objects,none"]
        said = harness.answers(result, "vlmprune_scene_llava_long")
        assert method == "random" or all(len(one.split()) >= 60 for one in said)
    assert found["none"] > 0.7
    assert found["random"] < found["none"] - 0.1


def test_captions_are_scored_by_what_they_name():
    doc = {"answer": "top left red circle . bottom right blue 3 ."}
    score = lambda said: tuple(utils.score_caption(doc, [said]).values())  # noqa: E731
    assert score("the red circle is left of the blue 3 . the red circle .") == (1.0, 0.0)
    assert score("top left red circle .") == (2 / 3, 0.0)
    assert score("red circle . blue 3 . green cross . red red 4") == (2 / 3, 0.5)
    assert score("circle red") == (0.0, 0.0)
    assert score("green cross .") == (0.0, 1.0)


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
