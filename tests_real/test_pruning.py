"""Pruning on real weights: exact by hand, in half precision, in batches, on photographs."""

from __future__ import annotations

import json

import pytest
import real_weights
import torch
from checked import unseen
from transformers import AutoProcessor

import vlmprune
from vlmprune import registry
from vlmprune.cli import main
from vlmprune.verify import CHECKS, Subject

ALONE = sorted({*registry.names()} - {"atp", "globalcom2"})  # atp has no weights for this model
HALF = ("fopru", "fastv", "transprune")


@pytest.fixture(scope="module")
def subject(load):
    """`subject(name, dtype)`: the plain model's runs are made once."""
    made = {}

    def get(name, dtype=torch.float32):
        if (name, dtype) not in made:
            made.clear()
            made[name, dtype] = Subject(load(name, dtype))
        return made[name, dtype]

    return get


@pytest.mark.parametrize("method", ALONE)
def test_every_method_by_hand(subject, method):
    report = subject("llava").check(method, keep=0.25)
    print(report)
    none = {"syncs", *unseen(method)} | ({"positions"} if method == "downsample" else set())
    assert {line.check: line.outcome for line in report.lines} == {c: "-" if c in none else "pass" for c in CHECKS}


@pytest.mark.parametrize("method", ["globalcom2", "fopru", "transprune"])
def test_views_and_newlines_by_hand(subject, method):
    report = subject("llava-next").check(method, keep=0.25)
    print(report)
    assert {line.check: line.outcome for line in report.lines} == {c: "-" if c == "syncs" else "pass" for c in CHECKS}


def test_half_precision_leaves_two_of_24_lines_open_at_most(subject):
    reports = [subject("llava", torch.bfloat16).check(method, keep=0.25) for method in HALF]
    print(*reports, sep="\n")
    assert [report.failed + report.unknown for report in reports] == [[], [], []]
    assert sum(len(report.open) for report in reports) <= 2
    assert sum(line.outcome != "-" for report in reports for line in report.lines) == 24


@pytest.mark.parametrize("method", ["fopru", "fastv", "transprune", "pool"])
def test_photographs_in_a_batch_are_answered_as_alone(real, load, method):
    model, processor = load("llava"), AutoProcessor.from_pretrained(real / "llava")
    asked = {
        "chelsea.png": "Which animal is it?",
        "coffee.png": "What is in the cup? Answer in a sentence.",
        "moon.png": "What?",
    }
    pictures = [real_weights.photograph(name) for name in asked]
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
            add_generation_prompt=True,
        )
        for text in asked.values()
    ]

    def answers(images, texts):
        inputs = processor(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        return out[:, inputs["input_ids"].shape[1] :].tolist()

    plain = answers(pictures, prompts)
    with vlmprune.patch(model, method, keep=16):
        together = answers(pictures, prompts)
        alone = [answers([picture], [text])[0] for picture, text in zip(pictures, prompts, strict=True)]
    assert together == alone
    assert answers(pictures, prompts) == plain
    assert len({*map(tuple, plain)}) == 3  # the picture is read


def test_fidelity_on_photographs(real, tmp_path, capsys):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for name in ("chelsea.png", "coffee.png", "rocket.jpg"):
        real_weights.photograph(name).save(folder / name)
    (tmp_path / "prompts.txt").write_text("What is in the picture? Answer in one word.\n")
    out = tmp_path / "out"
    argv = [
        "fidelity",
        "--model",
        str(real / "llava"),
        "--images",
        str(folder),
        "--prompts",
        str(tmp_path / "prompts.txt"),
    ]
    argv += ["--method", "fopru", "--keep", "10%,100%", "--controls", "random", "--seeds", "1", "--max-new-tokens", "8"]
    assert main([*argv, "--out", str(out)]) == 0
    print(capsys.readouterr().out)
    lines = {line["label"]: line for line in json.loads((out / "results.json").read_text())["summary"]}
    everything, tenth = lines["fopru, keep 1.0"], lines["fopru, keep 0.1"]
    assert {name: found["value"] for name, found in everything["measures"].items()} == {
        "first_agrees": 1, "answer_agrees": 1, "kl_first": 0, "kl_answer": 0,
    }  # fmt: skip
    assert (tenth["tokens_before"], tenth["tokens_after"]) == (256, 25)
    assert tenth["measures"]["kl_first"]["value"] > 0
