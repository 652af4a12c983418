"""Training of ATP's modules: data, resuming, several processes."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_folders
import torch
from probes import same

from vlmprune.methods.atp.data import Questions, encode
from vlmprune.methods.atp.modules import AtpConfig, Thresholds, load
from vlmprune.methods.atp.training import Training, facts_of, train

ROOT = Path(__file__).parents[2]
CUTS = (1, 2, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder and a file of questions."""
    folder = tmp_path_factory.mktemp("atp")
    tiny_folders.save(folder / "model")
    rows = []
    for i in range(6):
        tiny_folders.noise_picture(24, 24, i).save(folder / f"{i}.png")
        rows.append(
            {"image": f"{i}.png", "question": "what colour is it ?", "answer": f"word{i} word3" if i % 2 else "it"}
        )
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


def test_questions(folder, tmp_path):
    assert len(Questions(folder / "data.json")) == len(Questions(folder / "data.jsonl", folder)) == 6
    image, question, answer = Questions(folder / "data.jsonl")[1]
    assert (image.size, question, answer) == ((24, 24), "what colour is it ?", "word1 word3")
    for text, match in (
        ('{"image": "a.png", "question": "?"}', "entry 1 has no 'answer'"),
        ("", "has no entries"),
        ("image,question", "neither a JSON list nor JSON lines"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=match):
            Questions(tmp_path / "bad.json")
    with pytest.raises(FileNotFoundError, match="no such file"):
        Questions(tmp_path / "none.json")


def test_labels_are_the_answers_alone(folder):
    processor = tiny_folders.processor()
    inputs = encode([Questions(folder / "data.jsonl")[i] for i in (0, 1)], processor)
    said = [processor.tokenizer.decode(row[row != -100]) for row in inputs["labels"]]
    assert said == ["it </s>", "word1 word3 </s>"]
    assert (inputs["labels"][:, -1] == processor.tokenizer.eos_token_id).all()
    other = encode([Questions(folder / "data.jsonl")[0]], processor, "user: <image> {question} assistant:")
    assert processor.tokenizer.decode(other["input_ids"][0]).endswith("what colour is it ? assistant: it </s>")
    processor.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        encode([Questions(folder / "data.jsonl")[0]], processor)


class Stop(Exception):
    pass


def test_training_resumes_where_it_was_stopped(folder, tmp_path, monkeypatch):
    from transformers import AutoModelForImageTextToText

    model, processor = AutoModelForImageTextToText.from_pretrained(folder / "model"), tiny_folders.processor()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    config = AtpConfig.of(facts_of(model), 0.5, pool=8, hidden=16)
    options = Training(steps=6, batch=2, lr=1e-2, warmup=2, save_every=2)

    def run(out):
        return train(model, processor, Questions(folder / "data.jsonl"), config, out, options, progress=False)

    whole = run(tmp_path / "whole")
    draw = Training.rows
    monkeypatch.setattr(Training, "rows", lambda self, step, **k: draw(self, step, **k) if step < 5 else stop())

    def stop():
        raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "parts")
    monkeypatch.undo()
    assert len((tmp_path / "parts/log.jsonl").read_text().splitlines()) == 4
    resumed = run(tmp_path / "parts")
    for name, value in whole.state_dict().items():
        same(resumed.state_dict()[name], value, 1e-6)
    assert (tmp_path / "parts/log.jsonl").read_text().count("\n") == 6
    assert (tmp_path / "parts/loss.png").stat().st_size > 1000
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    fresh = Thresholds(config)
    assert any((fresh.state_dict()[k] - v).abs().max() > 1e-3 for k, v in whole.state_dict().items())
    with pytest.raises(ValueError, match=r"holds another training: average=0\.5 \(now 0\.6\)"):
        train(model, processor, [], replace(config, average=0.6), tmp_path / "whole", options)


def command(folder, out):
    return [
        str(ROOT / "scripts/train_atp.py"), "--model", str(folder / "model"), "--data", str(folder / "data.jsonl"),
        "--average", "0.5", "--out", str(out), "--steps", "3", "--batch", "4", "--lr", "1e-2", "--warmup", "1",
        "--check", "4", "--pool", "8", "--hidden", "16", "--strides", "2", "4",
    ]  # fmt: skip


def test_the_script_has_the_defaults_of_the_modules(monkeypatch):
    script = str(ROOT / "scripts/train_atp.py")
    monkeypatch.setattr(sys, "argv", [script, "--model", "m", "--data", "d", "--average", "0.5", "--out", "o"])
    args = vars(runpy.run_path(script)["parse"]())
    for name in ("pool", "hidden", "strides", "form", "score_norm", "mean_over"):
        told = tuple(args[name]) if isinstance(args[name], list) else args[name]
        assert told == getattr(AtpConfig, name), name


def test_two_processes_train_what_one_does(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", command(folder, tmp_path / "one"))
    runpy.run_path(sys.argv[0], run_name="__main__")
    assert "aimed at an average of 0.5" in capsys.readouterr().out
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"]
    options = ["--main_process_port", "0", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *options, *command(folder, tmp_path / "two")], capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("aimed at an average of 0.5") == 1
    config = load(tmp_path / "one").config
    assert (config.pool, config.hidden, config.strides) == (8, 16, (2, 4))
    one, two = load(tmp_path / "one").state_dict(), load(tmp_path / "two").state_dict()
    for name, value in one.items():
        same(two[name], value, 1e-4)
    logs = [json.loads((tmp_path / run / "log.jsonl").read_text().splitlines()[-1]) for run in ("one", "two")]
    assert logs[0]["soft_average"] == pytest.approx(logs[1]["soft_average"], abs=1e-4)
