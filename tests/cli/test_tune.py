"""`vlmprune tune` end to end: on the trained model and its pictures, and with a made-up clock and answers."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import yaml
from tiny_folders import answer

import vlmprune
from vlmprune.eval.fidelity import costs, measure
from vlmprune.eval.tune import candidates
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
    assert "they say nothing about a real model" in said


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
    assert "None of the 4 candidates tried is 4 times as fast" in out
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


def test_timing_leaves_time_for_answers(run, monkeypatch):
    """A candidate takes a minute to time, of five: three are, in half of the time, each method among them."""
    clock = {"now": 0.0}
    cost = costs.measure_costs

    def slow(*args):
        clock["now"] += 60
        return cost(*args)

    init = tuning.Tuning.__init__
    monkeypatch.setattr(tuning.Tuning, "__init__", lambda self, *args: init(self, *args, now=lambda: clock["now"]))
    monkeypatch.setattr(costs, "measure_costs", slow)
    code, results, _, err = run(minutes="5")
    assert code == 0, err
    assert "1 candidate not tried at all: --resume goes on" in err
    assert not results["complete"]
    assert {one["label"] for one in results["finalists"]} == {"fopru, keep 0.5", "grid, keep 0.5", "fopru, keep 1.0"}


def test_all_methods_come_before_other_budgets(folders):
    from vlmprune import registry

    tried = candidates.all_methods([{"keep": 0.5}, {"keep": 0.25}], {})
    jobs, refused = tried.jobs, tried.refused
    first = [job.method for job in jobs[: len(registry.names()) - len(refused)]]
    assert len(set(first)) == len(first)
    assert set(first) | set(refused) == set(registry.names())


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
        for pair in (one.pair for one in some):
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


def test_who_refuses_a_picture_is_left_out_and_named(run, monkeypatch):
    """Only grid at keep 0.5 refuses, and only one of the pictures: all others are reported on."""
    from vlmprune.runtime.errors import UserError

    one_batch = tuning.fidelity_run.one_batch

    def refusing(loaded, todo, some, *more):
        if any(entry.label == "grid, keep 0.5" for entry, _ in todo.steps) and any(
            one.pair.picture == "b.jpg" for one in some
        ):
            raise UserError("this picture is too small")
        one_batch(loaded, todo, some, *more)

    monkeypatch.setattr(tuning.fidelity_run, "one_batch", refusing)
    code, results, _, err = run()
    assert code == 0, err
    assert results["refused"] == {"grid": ["keep 0.5: this picture is too small"]}
    assert {one["label"] for one in results["finalists"]} == {"fopru, keep 0.5", "fopru, keep 1.0", "grid, keep 1.0"}
    assert {one["pictures"] for one in results["finalists"]} == {4}
    assert "left out: grid, keep 0.5: this picture is too small" in err


def test_methods_that_do_not_go_with_the_model_are_named(run, folders):
    """All methods on a model without [CLS]: those that need one are named, and nothing fails."""
    code, results, _, err = run(methods="all", keep="0.5", model=folders["siglip"])
    assert code == 0, err
    assert "[CLS]" in results["refused"]["vtc_cls"][0]
    assert {"atp", "downsample", "globalcom2"} <= set(results["refused"])
    assert "left out: vtc_cls: " in err
    assert len({one["method"] for one in results["candidates"]}) > 15


@pytest.fixture
def own(folders, tmp_path, cli, monkeypatch):
    """`own(kl=..., ...)`: `tune --method scope` with answers made up by alpha: code, results, stderr, who was asked."""
    pytest.importorskip("optuna")
    from PIL import Image

    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(12):
        Image.new("RGB", (24, 24), (i, 0, 0)).save(photos / f"{i}.png")
    (tmp_path / "prompts.txt").write_text("what is it ?\n")
    monkeypatch.setattr(costs, "measure_costs", timed(lambda method: 2.0))
    asked: list[tuple[str, str]] = []

    def call(*more, kl=lambda alpha: (alpha - 2.5) ** 2, tokens=lambda alpha: 4.0, out="out", **given):
        def answered(loaded, todo, some, longest, tell):
            for entry, seed in todo.steps:
                rows = {}
                for pair in (one.pair for one in some):
                    asked.append((entry.label, pair.picture))
                    alpha = entry.options.get("alpha", 1.0)
                    far = kl(alpha)
                    one = measure.Compared(far < 0.3, far < 0.3, far, far, [], 16, 4, tokens(alpha))
                    (key,) = tuning.fidelity_run.Todo(todo.journal, [entry], [pair]).keys(pair)
                    rows[key] = measure.StudyRow(pair.picture, pair.prompt, entry.label, seed, "a", "b", one)
                todo.journal.add(rows)

        monkeypatch.setattr(tuning.fidelity_run, "one_batch", answered)
        flags = {
            "images": photos, "prompts": tmp_path / "prompts.txt", "model": folders["llava"], "method": "scope",
            "keep": "0.5", "trials": "20", "speedup": "1.5", "max_loss": "60%", "out": tmp_path / out, "worst": "0",
        } | given  # fmt: skip
        argv = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", value) if value]
        code, _, err = cli("tune", *argv, *more)
        file = tmp_path / out / "results.json"
        return code, json.loads(file.read_text()) if file.is_file() else None, err, asked

    return call


def test_a_methods_own_options(own, tmp_path):
    code, results, err, asked = own()
    assert code == 0, err
    assert len(results["trials"]) == 1 + 20
    assert results["trials"][0] | {"kl": None} == {
        "number": 0, "options": {}, "kl": None, "layer_average": 4.0, "why": "",
    }  # fmt: skip
    assert results["trials"][0]["kl"] == pytest.approx(1.5**2)
    best = min(results["trials"], key=lambda one: one["kl"])
    assert abs(best["options"]["alpha"] - 2.5) < 0.3
    recipe = read_recipe(tmp_path / "out" / "recipe.yaml")
    assert (recipe.method, recipe.given) == ("scope", {"keep": 0.5, **best["options"]})
    assert "yes" in results["statement"]
    # the verdict is of pictures that the search has not seen, beside the method's own options
    seen = {picture for label, picture in asked if label.endswith("trial 1")}
    others = {picture for label, picture in asked if label == results["finalists"][0]["label"]} - seen
    assert (len(seen), len(others), results["finalists"][0]["verdict"]["pictures"]) == (6, 6, 6)
    assert "scope, keep 0.5" in {one["label"] for one in results["finalists"]}
    assert len(results["finalists"]) == 4


def test_a_stopped_search_for_options_is_gone_on_with(own, tmp_path, monkeypatch):
    _, whole, _, asked = own(out="whole")
    all_of_it = len(asked)

    def stopping(alpha, left=[30]):  # noqa: B006
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return (alpha - 2.5) ** 2

    code, _, err, asked = own(kl=stopping)
    assert code == 130, err
    assert len(asked) == all_of_it + 30
    code, results, err, asked = own("--resume")
    assert code == 0, err
    assert results["trials"] == whole["trials"]
    assert results["finalists"] == whole["finalists"]
    assert len(asked) == 2 * all_of_it + 1  # what was there is not asked again
    assert own("--resume")[1]["trials"] == whole["trials"]
    assert len(asked) == 2 * all_of_it + 1


def test_options_that_cost_more_or_are_refused_are_not_taken(own):
    from vlmprune.runtime.errors import CommandError

    def refusing(alpha):
        if alpha < 1:
            raise CommandError("too small for this picture")
        return (alpha - 2.5) ** 2

    code, results, err, _ = own(kl=refusing, tokens=lambda alpha: 4.0 if alpha < 2 else 4.5)
    assert code == 0, err
    told = {one["why"] for one in results["trials"]}
    assert told == {"", "too small for this picture", "sees 4.5 tokens, more than 4.0"}
    taken = {one["label"] for one in results["finalists"]}
    for one in results["trials"]:
        if one["options"].get("alpha", 1) >= 2 or one["kl"] is None:
            assert f"scope, keep 0.5, trial {one['number']}" not in taken
    assert len(taken) > 1


def test_options_for_real(cli, tmp_path):
    """On the trained model, from the command to a recipe; a budget is an average, which holds the cost."""
    pytest.importorskip("optuna")
    given = ["--method", "vflowopt", "--trials", "3", "--limit", "4", "--repeats", "1", "--max-new-tokens", "3"]
    code, _, err = cli(
        "tune", *given, "--out", tmp_path / "out", "--max-loss", "90%", "--speedup", "0.1", "--worst", "0"
    )
    assert code == 0, err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [set(one["options"]) for one in results["trials"]] == [
        set(),
        *[{"threshold", "cell", "second", "third"}] * 3,
    ]
    own, *found = (one["layer_average"] for one in results["trials"])
    assert all(tokens == pytest.approx(own, rel=0.05) for tokens in found)
    recipe = read_recipe(tmp_path / "out" / "recipe.yaml")
    assert recipe.average == 0.25
    model, _ = vlmprune.load("scene-llava", device="cpu", dtype=torch.float32)
    vlmprune.patch(model, tmp_path / "out" / "recipe.yaml")


def test_optuna_is_an_extra(own, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, results, err, _ = own()
    assert (code, results, "pip install 'vlmprune[tune]'" in err) == (2, None, True), err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "fopru"}, "fopru has no option with a range left to search. Who has some: "),
        ({"option": "alpha=1.5"}, "no option with a range left"),
        ({"method": "vflowop"}, "Did you mean 'vflowopt'"),
        ({"methods": "grid"}, "--method is not allowed with --methods"),
        ({"limit": "1"}, "at least two pictures"),
        ({"average": "0.5"}, "--average is not allowed with --keep"),
        ({"trials": "0"}, "--trials must be at least 1"),
    ],
)
def test_mistakes_with_own_options(own, given, words):
    code, results, err, _ = own(**given)
    assert (code, results, words in err) == (2, None, True), err


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
    jobs = candidates.all_methods([{"keep": 0.5}], {}).fitting(loaded)
    names = {job.method for job in jobs}
    assert {"fopru", "fastv", "random", "grid"} <= names
    assert not {"vtc_cls", "globalcom2", "atp", "downsample"} & names
    assert {job.method for job in jobs if not job.options} >= {"fastv"}
