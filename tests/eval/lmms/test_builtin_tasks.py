"""lmms-eval's own prompts and scoring of six built-in tasks, over local documents of the same schema.

A tiny random model answers, with one of a few words; what the tasks make of its answers is checked against scores that
are worked out here.
"""

import random
import re

import datasets
import harness
import pytest
import tiny
import tiny_folders
import torch
from lmms_eval.api.task import ConfigurableMessagesTask
from PIL import Image

from vlmprune.eval.lmms.model import VlmPrune

WORDS = ("yes", "no", "A", "B", "C", "D", "red", "two")
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def plain(i):
    """Pictures of one colour: a random model tells these apart, where all noise is the same to it."""
    return Image.new("RGB", (24, 24), tuple(random.Random(i).choices((0, 90, 255), k=3)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model whose last words are those of `WORDS`."""
    place = tmp_path_factory.mktemp("tiny") / "llava"
    made = tiny.model()
    with torch.no_grad():
        made.get_input_embeddings().weight.mul_(0.03)  # so that the picture decides, not the prompt's last word
    made.save_pretrained(place)
    processor = tiny_folders.processor()
    inner = processor.tokenizer.backend_tokenizer
    words = inner.to_str()
    for i, word in enumerate(WORDS):
        words = words.replace(f'"word{i}"', f'"{word}"')
    processor.tokenizer._tokenizer = type(inner).from_str(words)
    processor.save_pretrained(place)
    return str(place)


@pytest.fixture
def model(folder):
    def load(*answers, **options):
        lm = VlmPrune(folder, device="cpu", batch_size=3, **({"method": "fopru", "keep": 5} | options))
        ids = lm.loaded.processor.tokenizer.convert_tokens_to_ids(list(answers))
        config = lm.loaded.model.generation_config
        config.suppress_tokens = [i for i in range(tiny.VOCAB) if i not in ids]
        config.eos_token_id = ids  # it stops after one word
        return lm

    return load


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Evaluate a built-in task over rows; returns the numbers and the answers, and checks the prompts."""
    monkeypatch.chdir(tmp_path)  # two of the tasks write a submission

    def evaluate(name, lm, rows, prompts):
        rows = [{"image": harness.as_file(plain(i))} | r for i, r in enumerate(rows)]
        manager = harness.builtin()
        config = dict(manager._get_config(name))
        split = config["test_split"]
        place = harness.save_docs(tmp_path / name, rows, split)
        config.update(dataset_path=place, dataset_name=None, dataset_kwargs={"load_from_disk": True})
        asked = []
        prepare = lm.inputs
        monkeypatch.setattr(lm, "inputs", lambda some: asked.extend(some) or prepare(some))
        task = ConfigurableMessagesTask(config=config, model_name="vlmprune")
        result = harness.evaluate(lm, [task], manager)
        seen = {one.request.doc_id: one for one in asked}
        assert [seen[i].text for i in range(len(rows))] == [f"<s>user: <image> {text} assistant:" for text in prompts]
        assert {len(one.images) for one in asked} == {1}
        records = lm.take_records()
        assert [r["doc"] for r in records] == list(range(len(rows)))
        assert {(r["tokens_before"], r["tokens_after"], r["output_tokens"]) for r in records} == {(16, 5, 1)}
        said = harness.answers(result, name)
        assert len(set(said)) > 1
        return result["results"][name], said

    return evaluate


def test_pope(model, run):
    rows = [
        {"question_id": str(i), "question": f" is there a word{i + 20} ? ", "answer": ("yes", "no")[i % 2]}
        for i in range(24)
    ]
    prompts = [row["question"].strip() + SHORT for row in rows]
    scores, said = run("pope", model("yes", "no"), rows, prompts)
    gold = [row["answer"] for row in rows]
    pairs = list(zip(said, gold, strict=True))
    hits = pairs.count(("yes", "yes"))
    precision = hits / max(1, sum(s == "yes" for s in said))
    recall = hits / max(1, hits + pairs.count(("no", "yes")))
    assert scores["pope_accuracy,none"] == pytest.approx(sum(s == g for s, g in pairs) / 24)
    assert 0 < scores["pope_accuracy,none"] < 1
    assert scores["pope_precision,none"] == pytest.approx(precision)
    assert scores["pope_recall,none"] == pytest.approx(recall)
    assert scores["pope_f1_score,none"] == pytest.approx(2 * precision * recall / (precision + recall))


def test_gqa(model, run, monkeypatch):
    """Its pictures come from a second data set, which it looks up by `imageId`."""
    rows = [
        {"imageId": f"p{i % 4}", "question": f"word{i + 20} ?", "answer": ("red", "two", "Two.")[i % 3], "image": None}
        for i in range(12)
    ]
    shown = [{"id": f"p{i}", "image": harness.as_file(plain(i))} for i in range(4)]
    pictures = datasets.Dataset.from_list(shown).cast_column("image", datasets.Image())
    join = harness.builtin()._get_config("gqa")["process_docs"]
    monkeypatch.setitem(join.__globals__, "load_dataset", lambda *names, **options: pictures)
    monkeypatch.setattr(harness.builtin(), "_get_config", with_join(harness.builtin()._get_config, join))
    prompts = [row["question"] + SHORT for row in rows]
    scores, said = run(
        "gqa", model("red", "two"), [{k: v for k, v in r.items() if k != "image"} for r in rows], prompts
    )
    gold = [row["answer"].lower().strip(".") for row in rows]
    right = [s == g for s, g in zip(said, gold, strict=True)]
    assert scores["exact_match,none"] == pytest.approx(sum(right) / 12)
    assert 0 < sum(right) < 12


def with_join(get, join):
    """`_get_config` loads the task's module anew at every call: hand out the function that was prepared."""
    return lambda name: {**get(name), "process_docs": join}


def test_mme(model, run):
    kinds = ("existence", "color", "code_reasoning")
    rows = [
        {
            "question_id": f"{kind}/{i // 2}", "category": kind, "answer": ("Yes", "No")[i % 2],
            "question": f"is there a word{i + 20} ? Please answer yes or no.",
        }
        for kind in kinds
        for i in range(8)
    ]  # fmt: skip
    prompts = [row["question"].replace(" Please answer yes or no.", "") + SHORT for row in rows]
    scores, said = run("mme", model("yes", "no"), rows, prompts)
    right = {(row["question_id"], row["answer"]): s == row["answer"].lower() for row, s in zip(rows, said, strict=True)}
    total = {}
    for kind in kinds:
        pairs = [[right[f"{kind}/{q}", answer] for answer in ("Yes", "No")] for q in range(4)]
        total[kind] = 100 * sum(map(sum, pairs)) / 8 + 100 * sum(map(all, pairs)) / 4
    assert scores["mme_perception_score,none"] == pytest.approx(total["existence"] + total["color"])
    assert scores["mme_cognition_score,none"] == pytest.approx(total["code_reasoning"])
    assert 0 < scores["mme_perception_score,none"] < 400


def test_textvqa_val(model, run, tmp_path):
    wanted = (["red"] * 10, ["red"] * 2 + ["blue"] * 8, ["Two"] * 3 + ["red"] * 1 + ["blue"] * 6)
    rows = [
        {"question_id": i, "question": f"word{i + 20} ?", "answers": wanted[i % 3], "ocr_tokens": ["STOP"]}
        for i in range(12)
    ]
    prompts = [f"Word{i + 20} ?{SHORT}" for i in range(12)]
    scores, said = run("textvqa_val", model("red", "two"), rows, prompts)

    def score(answer, golds):  # the VQA accuracy: over the ten ways to leave one annotator out; "two" is read as 2
        golds = [{"Two": "2"}.get(g, g) for g in golds]
        answer = {"two": "2"}.get(answer, answer)
        return sum(min(1, sum(g == answer for g in golds[:i] + golds[i + 1 :]) / 3) for i in range(10)) / 10

    expected = [score(s, row["answers"]) for s, row in zip(said, rows, strict=True)]
    assert scores["exact_match,none"] == pytest.approx(sum(expected) / 12)
    assert len(set(expected)) > 2
    assert list(tmp_path.rglob("textvqa_submission_*.json"))


def test_scienceqa_img(model, run):
    rows = [
        {
            "question": f"word{i + 20} ?", "choices": ["red", "two", "yes", "no"][: 2 + i % 3], "answer": i % 2,
            "hint": "word30" if i % 2 else "",
        }
        for i in range(12)
    ]  # fmt: skip
    prompts = []
    for row in rows:
        listed = "\n".join(f"{'ABCD'[k]}. {choice}" for k, choice in enumerate(row["choices"]))
        context = f"Context: {row['hint']}\n" if row["hint"] else ""
        prompts.append(f"{context}{row['question']}\n{listed}{LETTER}")
    scores, said = run("scienceqa_img", model("A", "B", "C"), rows, prompts)
    right = [s == "AB"[row["answer"]] for s, row in zip(said, rows, strict=True)]
    assert scores["exact_match,none"] == pytest.approx(sum(right) / 12)
    assert 0 < sum(right) < 12


def test_mmbench_en_dev_static(model, run, tmp_path):
    rows = [
        {
            "index": i, "question": f"word{i + 20} ?", "answer": "ABCD"[i % 4], "hint": "nan" if i % 2 else "word30",
            "A": "word11", "B": "word12", "C": "word13", "D": "word14", "category": "c", "L2-category": "l",
            "source": "s", "split": "dev",
        }
        for i in range(12)
    ]  # fmt: skip
    options = "There are several options:\n" + "\n".join(f"{letter}. word{11 + i}" for i, letter in enumerate("ABCD"))
    prompts = []
    for row in rows:
        hint = "" if row["hint"] == "nan" else f"{row['hint']} "
        prompts.append(f"{hint}{row['question']} {options}\n{LETTER}")
    scores, said = run("mmbench_en_dev_static", model("A", "B", "D"), rows, prompts)
    right = [s == row["answer"] for s, row in zip(said, rows, strict=True)]
    assert scores["gpt_eval_score,none"] == pytest.approx(100 * sum(right) / 12)
    assert 0 < sum(right) < 12
    assert list(tmp_path.rglob("mmbench_en_dev_results.xlsx"))


def test_the_tasks_are_those_of_lmms_eval():
    manager = harness.builtin()
    for name in ("pope", "gqa", "mme", "textvqa_val", "scienceqa_img", "mmbench_en_dev_static"):
        assert re.search(r"lmms_eval/tasks/", manager._get_yaml_path(name))
