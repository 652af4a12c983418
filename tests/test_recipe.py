"""Recipes: what a file may say, that a patch by one is the patch by hand, and what is refused with its line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import scenes
import tiny
import tiny_folders
import torch
import yaml

import vlmprune
from vlmprune.methods.fastv import FastV
from vlmprune.methods.fopru import FoPru
from vlmprune.recipe import FILE, Recipe, read_recipe, recipe_of
from vlmprune.yamls.tree import Mistakes

WHOLE = """\
recipe: 1
method: fopru
keep: 0.25
options: {layer: 2, strategy: row}
family: llava
model: some/model
measured: {speedup: 2.3}
versions: {vlmprune: 0.1.0}
made: "2026-11-29"
"""


@pytest.fixture
def file(tmp_path):
    """`file(text)`: the path of a recipe."""

    def write(text=WHOLE):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return path

    return write


def test_a_patch_by_a_recipe_is_the_patch_by_hand(file, tiny_model):
    model = tiny_model(dtype=torch.float64)
    prompt = tiny.prompt(model, [2, "image", 3], [(24, 24)])
    told = {}
    for name, given in {
        "recipe": (file(),),
        "text": (str(file()),),
        "hand": ("fopru", {"keep": 0.25, "layer": 2, "strategy": "row"}),
        "other": ("fopru", {"keep": 0.5, "layer": 2, "strategy": "row"}),
    }.items():
        method, *options = given
        with torch.no_grad(), vlmprune.patch(model, method, **(options[0] if options else {})):
            told[name] = scenes.with_cache(model, prompt)
    assert torch.equal(told["recipe"], told["hand"])
    assert torch.equal(told["text"], told["hand"])
    assert not torch.equal(told["other"], told["hand"])


def test_a_file_says_what_it_was_made_of(file):
    recipe = read_recipe(file())
    assert (recipe.method, recipe.given) == ("fopru", {"keep": 0.25, "layer": 2, "strategy": "row"})
    assert read_recipe(file(recipe.text())) == recipe
    assert yaml.safe_load(recipe.text())["measured"] == {"speedup": 2.3}


@pytest.mark.parametrize("method", ["fopru+fastv", "[fopru, fastv]"])
def test_methods_in_a_row(file, method):
    recipe = read_recipe(file(f"recipe: 1\nmethod: {method}\noptions: {{fopru.keep: 0.5, fastv.keep: 4}}\n"))
    assert recipe.build() == [FoPru(keep=0.5), FastV(keep=4)]
    assert recipe.entry() == {"name": [{"name": "fopru", "keep": 0.5}, {"name": "fastv", "keep": 4}]}


def test_objects_become_their_recipe_without_defaults():
    methods = [FoPru(keep=0.5, layer=(1, 2)), FastV(keep=4, rows="all")]
    recipe = recipe_of(methods, family="llava")
    given = {"fopru.keep": 0.5, "fopru.layer": (1, 2), "fastv.keep": 4, "fastv.rows": "all"}
    assert recipe.given == given
    assert recipe.build() == methods


def test_a_published_schedule_is_asked_for_in_an_evaluation_as_such():
    assert recipe_of([FastV()]).entry() == {"name": "fastv", "own_budget": True}
    assert recipe_of([FastV(keep=3)]).entry() == {"name": "fastv", "keep": 3}


def test_what_has_no_name_has_no_recipe():
    class Mine(FoPru):
        name = ""

    with pytest.raises(ValueError, match="register each"):
        recipe_of([Mine(keep=3)])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("method: fopru\nkeep: 3\n", ["recipe is missing (the version"]),
        ("recipe: 1\nkeep: 3\n", ["method is missing (`vlmprune ls methods`)"]),
        ("recipe: 2\nmethod: fopru\nkeep: 4\n", ["mine.yaml:1: recipe must be 1, the only version"]),
        ("recipe: 1\nmethod: fopro\n", ["mine.yaml:2: unknown method 'fopro'. Did you mean 'fopru'"]),
        ("recipe: 1\nmethod: fopru\nkep: 4\n", ["mine.yaml:3: unknown key 'kep'. Did you mean 'keep'"]),
        ("recipe: 1\nmethod: fopru\nkeep: 3.5\n", ["mine.yaml:3: keep=3.5 is out of range"]),
        ("recipe: 1\nmethod: fopru\nkeep: 4\naverage: 4\n", ["mine.yaml:2: fopru: give keep= or average=, not both"]),
        ("recipe: 1\nmethod: fopru\nkeep: 4\noptions: {layr: 3}\n", ["mine.yaml:4:", "no option 'layr'", "'layer'"]),
        ("recipe: 1\nmethod: fopru\nkeep: 4\noptions: [1]\n", ["mine.yaml:4: options must be a mapping"]),
        ("recipe: 1\nmethod: fopru\nmade: 2026-11-29\n", ["mine.yaml:3", "is read as a date"]),
        ("recipe: 1\nmethod: !!python/object:os.system x\n", ["mine.yaml:2", "no plain value"]),
        ("- fopru\n", ["not a recipe"]),
        ("recipe: 1\nmethod: fopru\nkeep: 4\nmethod: fastv\n", ["mine.yaml:4: 'method' is given twice"]),
    ],
)
def test_mistakes_are_told_with_their_lines(file, tiny_model, text, words):
    model = tiny_model()
    with pytest.raises(Mistakes) as told:
        vlmprune.patch(model, file(text))
    assert all(word in str(told.value) for word in words), told.value


def test_no_recipe_there(tiny_model):
    with pytest.raises(ValueError, match="no such recipe"):
        vlmprune.patch(tiny_model(), "nowhere.yaml")


def test_options_beside_a_recipe_are_refused(file, tiny_model):
    with pytest.raises(TypeError, match="keep= cannot be combined with a recipe"):
        vlmprune.patch(tiny_model(), file(), keep=3)


def test_a_recipe_for_another_family_is_refused(file, tiny_model):
    with pytest.raises(vlmprune.UnsupportedError, match=r"is for models of type 'llava'.*of type 'llava_next'"):
        vlmprune.patch(tiny_model(family="llava_next"), file())


def test_a_model_saved_with_its_patch_comes_back_patched(tmp_path):
    model, processor = vlmprune.load(tiny_folders.save(tmp_path / "plain"), device="cpu")
    handle = vlmprune.patch(model, "fopru", keep=4)
    model.save_pretrained(tmp_path / "mine")
    processor.save_pretrained(tmp_path / "mine")
    assert handle.save_pretrained(tmp_path / "mine") == tmp_path / "mine" / FILE
    prompt = tiny.prompt(model, [2, "image", 3], [(24, 24)])
    with torch.no_grad():
        want = scenes.with_cache(model, prompt)
        again, _ = vlmprune.from_pretrained(tmp_path / "mine", device="cpu")
        assert torch.equal(scenes.with_cache(again, prompt), want)
        assert not torch.equal(scenes.with_cache(vlmprune.unpatch(again), prompt), want)


def test_a_model_without_a_recipe_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmprune.runtime.loading.load", lambda *args: pytest.fail("weights were loaded"))
    with pytest.raises(ValueError, match="has no recipe"):
        vlmprune.from_pretrained(tiny_folders.save(tmp_path / "plain"))


def test_the_schema_is_what_the_docstring_says():
    assert all(word in Recipe.__doc__ for word in Recipe.__dataclass_fields__)


def test_its_page_is_true(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).resolve().parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert read_recipe(file(text)).given == {"keep": 0.25, "strategy": "rank"}
    first, beside = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(first, "recipes.md", "exec"), names := {})
    assert names["handle"].methods == [FoPru(keep=0.25)]
    exec(compile(beside, "recipes.md", "exec"), names)
    assert vlmprune.patch(names["model"], "mine/vlmprune.yaml").methods == [FoPru(keep=0.25)]
