"""`vlmprune tune` end to end: on the trained model and its pictures, and with a made-up clock and answers."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from tiny_folders import answer

import vlmprune
from vlmprune.cli import tune as verb
from vlmprune.eval.fidelity import costs, measure
from vlmprune.eval.tune import run as tuning
from vlmprune.recipe import read_recipe


def timed(speed):
    """Costs by method, as a clock would tell them."""

    def made(handle, inputs, tokens, pairs, clock=None):
        times = speed(handle.methods[0])
        one = {"median": times, "low": times, "high": times, "pairs": pairs}
        return costs.EntryCosts((10, 10 / times), (20, 20 / times), one, one, (100, 50), (100, 40), tokens, 1)

    return made


@pytest.fixture
def run(cli, folders, pictures, tmp_path, monkeypatch):
    """`run(flags=...)` on a tiny model with four pictures: code, results.json, stdout, stderr."""
    (tmp_path / "prompts.txt").write_text("what colour is it ?\n")
    monkeypatch.setattr(costs, "measure_costs", timed(lambda method: 3 - 2 * (method.keep or 0.5)))

    def call(*more, **given):
        flags = {
            "images": pictures, "prompts": tmp_path / "prompts.txt", "model": folders["llava"], "out": tmp_path / "out",
            "methods": "fopru,grid", "keep": "0.5,1.0", "max_new_tokens": "2", "worst": "1",
        } | given  # fmt: skip
        argv = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", value) if value]
        code, out, err = cli("tune", *argv, *more)
        file = tmp_path / "out" / "results.json"
        return code, json.loads(file.read_text()) if file.is_file() else None, out, err

    return call


def test_on_the_models_own_pictures(cli, tmp_path):
    """For real: from nothing but the command to a recipe that patches."""
    out = tmp_path / "out"
    given = [
        "--methods",
        "fopru,random",
        "--keep",
        "0.5,0.05",
        "--limit",
        "6",
        "--repeats",
        "2",
        "--max-new-tokens",
        "4",
    ]
    short = ["--speed-of", "first", "--max-new-tokens", "4"]
    code, said, err = cli("tune", *given, "--out", out, "--speedup", "0.5", "--max-loss", "90%", *short)
    assert code == 0, err
    results = json.loads((out / "results.json").read_text())
    assert results["scored"]
    assert {one["label"] for one in results["finalists"]} == {
        f"{method}, keep {keep}" for method in ("fopru", "random") for keep in (0.5, 0.05)
    }
    by = {one["label"]: one for one in results["finalists"]}
    assert by["fopru, keep 0.5"]["verdict"]["loss"] <= by["random, keep 0.05"]["verdict"]["loss"]
    assert by["fopru, keep 0.05"]["costs"]["kv"][1] < by["fopru, keep 0.5"]["costs"]["kv"][1]
    assert results["statement"] in said
    recipe = read_recipe(out / "recipe.yaml")
    assert (recipe.method, recipe.given) == (results["best"]["method"], results["best"]["options"])
    model, _ = vlmprune.load("scene-llava", device="cpu", dtype=torch.float32)
    assert vlmprune.patch(model, out / "recipe.yaml").methods == recipe.build()
    assert f"recipe: {out / 'recipe.yaml'}" in said
    assert "vlmprune serve --model scene-llava" in said


def test_the_fast_enough_with_least_loss_wins(run):
    code, results, _, err = run(speedup="1.5", max_loss="99%")
    assert code == 0, err
    assert not results["scored"]
    # keep 1.0 changes nothing and is too slow, keep 0.5 is twice as fast
    best = results["best"]
    assert best["options"] == {"keep": 0.5}
    losses = {one["label"]: one["verdict"]["loss"] for one in results["finalists"]}
    assert losses["fopru, keep 1.0"] == losses["grid, keep 1.0"] == 0
    assert losses[f"{best['method']}, keep 0.5"] == min(losses["fopru, keep 0.5"], losses["grid, keep 0.5"])
    assert "2.00 times as fast" in results["statement"]


def test_what_is_too_slow_is_said(run):
    code, _, out, _ = run(speedup="4", max_loss="99%")
    assert code == 0
    assert "Nothing tried is 4 times as fast" in out
    assert "the fastest of all was fopru, keep 0.5, 2.00 times" in out or "grid, keep 0.5, 2.00 times" in out


def test_few_pictures_prove_nothing_and_it_says_how_many_would(run):
    code, results, _, _ = run(methods="fopru", keep="1.0", speedup="1", max_loss="1%")
    assert code == 0
    found = results["finalists"][0]["verdict"]
    assert (found["answer"], found["pictures"]) == ("open", 4)
    assert f"needs about {found['more']} more pictures" in results["statement"]


def test_given_answers_are_scored(run, folders, pictures, tmp_path):
    """The unpruned model's own answers are given as right: keep 1.0 loses nothing, wrong ones cost nobody anything."""
    right = {name: answer(folders["llava"], pictures / name, "what is it ?", 2) for name in ("a.png", "b.jpg")}
    data = tmp_path / "data.jsonl"

    def write(answers):
        lines = [{"image": name, "prompt": "what is it ?", "answer": said} for name, said in answers.items()]
        data.write_text("\n".join(map(json.dumps, lines)))

    write(right)
    code, results, _, err = run(prompts=None, data=data, keep="0.25,1.0", methods="grid")
    assert code == 0, err
    losses = {one["label"]: one["verdict"]["loss"] for one in results["finalists"]}
    said = {name: answer(folders["llava"], pictures / name, "what is it ?", 2, "grid", keep=0.25) for name in right}
    assert losses["grid, keep 0.25"] == sum(said[name] != right[name] for name in right) / 2
    assert losses["grid, keep 1.0"] == 0
    write(dict.fromkeys(right, "never said"))
    code, results, _, err = run("--resume", prompts=None, data=data, keep="0.25", methods="grid")
    assert (code, results["finalists"][0]["verdict"]["loss"]) == (0, 0), err


def test_what_is_there_is_not_measured_again(run, monkeypatch):
    assert run()[0] == 0
    code, _, _, err = run()
    assert (code, "--resume goes on" in err) == (2, True)
    monkeypatch.setattr(costs, "measure_costs", lambda *args: pytest.fail("timed again"))
    monkeypatch.setattr(tuning.fidelity_run, "one_batch", lambda *args: pytest.fail("measured again"))
    monkeypatch.setattr(costs.CostBook, "timed", property(lambda self: pytest.fail("timed again")))
    code, results, _, err = run("--resume")
    assert (code, results["complete"]) == (0, True), err


def test_time_that_is_over_ends_with_what_there_is(run, monkeypatch):
    """A clock that jumps by ten minutes at the first question: costs are known, one batch is measured, and no more."""
    clock = {"now": 0.0}
    one_batch = tuning.fidelity_run.one_batch

    def slow(*args):
        one_batch(*args)
        clock["now"] += 600

    init = tuning.Tuning.__init__
    monkeypatch.setattr(tuning.Tuning, "__init__", lambda self, *args: init(self, *args, now=lambda: clock["now"]))
    monkeypatch.setattr(tuning.fidelity_run, "one_batch", slow)
    code, results, _, err = run(minutes="5")
    assert code == 0, err
    assert not results["complete"]
    assert "--resume goes on" in err


def test_hopeless_candidates_see_few_pictures(folders, tmp_path, cli, monkeypatch):
    """Answers by a made-up model: of ten methods at budgets, what loses everything does not see all 32 pictures."""
    from PIL import Image

    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(32):
        Image.new("RGB", (24, 24), (i, 0, 0)).save(photos / f"{i}.png")
    (tmp_path / "prompts.txt").write_text("what is it ?\n")
    monkeypatch.setattr(costs, "measure_costs", timed(lambda method: 2.0))
    asked = []

    def answered(loaded, todo, some, longest, tell):
        rows = {}
        for pair, _ in some:
            for (entry, seed), key in zip(todo.steps, todo.keys(pair), strict=True):
                asked.append(entry.label)
                same = entry.options["keep"] >= 0.3
                one = measure.Compared(same, same, 0.0, 0.1, [], 16, 4, 4.0)
                rows[key] = measure.StudyRow(pair.picture, pair.prompt, entry.label, seed, "a", "b", one)
        todo.journal.add(rows)

    monkeypatch.setattr(tuning.fidelity_run, "one_batch", answered)
    keeps = "0.05,0.1,0.15,0.2,0.25,0.3,0.4,0.5,0.6,0.7"
    given = ["--images", photos, "--prompts", tmp_path / "prompts.txt", "--model", folders["llava"], "--keep", keeps]
    code, _, err = cli(
        "tune", *given, "--methods", "grid", "--out", tmp_path / "out", "--worst", "0", "--speedup", "1.5"
    )
    assert code == 0, err
    seen = {label: asked.count(label) for label in set(asked)}
    assert all(seen[f"grid, keep {keep}"] == 8 for keep in (0.05, 0.1, 0.15, 0.2, 0.25)), seen
    assert sum(count == 32 for count in seen.values()) == 4
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert recipe["keep"] >= 0.3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"images": None}, "name --images and --prompts"),
        ({"max_loss": "0"}, "--max-loss 0 must be above 0"),
        ({"max_loss": "much"}, "--max-loss 'much' is no share"),
        ({"speedup": "0"}, "--speedup must be above 0"),
        ({"methods": "fopro"}, "Did you mean 'fopru'"),
        ({"methods": "globalcom2"}, "single view"),
        ({"data": "x.jsonl"}, "--data is not allowed with --prompts"),
    ],
)
def test_mistakes(run, given, words):
    code, results, _, err = run(**given)
    assert (code, results, words in err) == (2, None, True), err


def test_all_means_what_fits(folders):
    from vlmprune.runtime import loading

    loaded = loading.load(loading.find_model(folders["siglip"]))
    jobs = verb.fitting(loaded, *verb.jobs_of(None, [{"keep": 0.5}], {}), named=False)
    names = {job.method for job in jobs}
    assert {"fopru", "fastv", "random", "grid"} <= names
    assert not {"vtc_cls", "globalcom2", "atp", "downsample"} & names
    assert {job.method for job in jobs if not job.options} >= {"fastv"}
