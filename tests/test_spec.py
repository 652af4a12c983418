"""What a user says becomes methods and budgets, the same by every way in; what was not said is not made up."""

from __future__ import annotations

import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import tiny
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmprune
from vlmprune import Method, UnsupportedError, registry, spec
from vlmprune.cli import flags
from vlmprune.eval.bench.asked import asked_in
from vlmprune.eval.config import schema as config
from vlmprune.eval.lmms import cells
from vlmprune.methods import FastV, FoPru, Random, ToDRE, TransPrune
from vlmprune.parts.budget import SmallBudgetWarning
from vlmprune.parts.facts import ModelFacts
from vlmprune.yamls.tree import Mistakes

ROOT = Path(__file__).resolve().parents[1]
NEXT = ModelFacts("llava_next", 24, 22, True, decoder_layers=32, views=True, view_patches=576)

VALUES = [
    ("None", None), ("null", None), ("none", "none"), ("true", True), ("False", False), ("7", 7), ("-2", -2),
    ("0.25", 0.25), (".5", 0.5), ("1e-3", 0.001), ("row", "row"), ("'7'", "7"), ('"None"', "None"), ("a=b", "a=b"),
    ("[7, 9,12]", (7, 9, 12)), ("(0.5,)", (0.5,)), ("[]", ()), ("[cls, None]", ("cls", None)), ("nan", "nan"), ("", ""),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), VALUES)
def test_text_means_a_value(text, value):
    got = spec.read_value(text)
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    ("value", "same"), [(None, None), (True, True), (-2.0, -2), (-0.5, -0.5), (2.0, 2.0), ([1], (1,))]
)
def test_what_is_no_text_stays(value, same):
    """But -2.0, which lmms-eval makes of -2."""
    assert (spec.read_value(value), type(spec.read_value(value))) == (same, type(same))


@pytest.mark.parametrize("text", ["[1, 2", "[[1], 2]", "[", "(1]"])
def test_lists_that_are_none(text):
    with pytest.raises(ValueError, match="is no list such as"):
        spec.read_value(text)


PLAIN = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(1e-6, 1e6) | st.sampled_from(
    ["row", "none", "None", "7", "true", "", "a=b", "0.5"]
)  # fmt: skip


@settings(max_examples=200, deadline=None, derandomize=True)
@given(PLAIN | st.lists(PLAIN.filter(lambda x: x != ""), max_size=3).map(tuple))
def test_what_is_written_is_read_back(value):
    got = spec.read_value(spec.write_value(value))
    assert (got, type(got)) == (value, type(value))


# One meaning by every way in


def by_python(method, options):
    with vlmprune.patch(tiny.shared(), method, **options) as handle:
        return handle.methods


def by_flags(method, options):
    keep = spec.read_budget(str(options["keep"]))
    others = [f"{key}={spec.write_value(value)}" for key, value in options.items() if key != "keep"]
    (job,) = spec.jobs([method], [{"keep": keep}], flags.options_of(others))
    return job.build()


def by_bench_again(method, options):
    """The options of an old result, turned to text and read again."""
    asked = {"asked": {}, "cells": [{"method": method, "options": options, "batch": 1}]}
    again = asked_in(asked)
    (job,) = spec.jobs(
        [again["method"]], [{"keep": spec.read_budget(again["keep"])}], flags.options_of(again["option"])
    )
    return job.build()


def by_yaml(method, options, tmp_path):
    path = tmp_path / "my.yaml"
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    setting = {"model": "scene-llava", "tasks": ["any"], "controls": False, "methods": [{"name": method, **options}]}
    path.write_text(yaml.safe_dump(setting))
    (setting,) = config.load_config(path).settings
    (entry,) = setting.methods
    cell = cells.cell_of(setting, entry, entry.budgets[0], None, "any", None)
    return spec.build(cell.method, cell.arguments, none=True)


@pytest.mark.parametrize(
    ("method", "options", "made"),
    [
        ("todre", {"keep": 4, "tau": None}, ToDRE(keep=4, tau=None)),
        ("todre", {"keep": 0.5}, ToDRE(keep=0.5)),
        ("transprune", {"keep": 4, "prune_layers": (2, 3, 9)}, TransPrune(keep=4, prune_layers=(2, 3, 9))),
        ("fopru", {"keep": 4, "layer": (1, 2), "newlines": "none"}, FoPru(keep=4, layer=(1, 2), newlines="none")),
        ("fastv", {"keep": 4, "layer": 3}, FastV(keep=4, layer=3)),
    ],
)
def test_every_way_in_means_the_same(method, options, made, tmp_path):
    for ways in (by_python, by_flags, by_bench_again):
        assert ways(method, options) == [made], ways
    assert by_yaml(method, options, tmp_path) == [made]


def test_lists_are_as_good_as_tuples():
    assert spec.build("fopru", {"keep": 4, "layer": [1, 2]}) == [FoPru(keep=4, layer=(1, 2))]


# Sharing options among methods


def test_joined_methods():
    made = [Random(keep=8), FastV(keep=4, layer=3)]
    assert spec.build("random+fastv", {"random.keep": 8, "fastv.keep": 4, "layer": 3}) == made
    assert spec.build(["random", FastV(keep=4, layer=3)], {"keep": 8}) == made
    assert spec.build("none", {}, none=True) == []


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("random+fastv", {"keep": 4}, r"keep= could mean any of 'random', 'fastv': write random.keep= or fastv.keep="),
        ("random+fastv", {"todre.keep": 4}, "'todre' is not one of the methods random, fastv"),
        ("random+fastv", {"random.sead": 4}, "'random' has no option 'sead'. Did you mean 'seed'"),
        ("random+random", {}, "twice"),
        (["random", "random"], {}, "twice"),
        ("random", {"keep": 4, "random.keep": 5}, "random.keep= is given twice"),
        ("none", {}, "the whole model"),
        ("none+random", {}, "cannot be combined"),
        ("atp", {"keep": 4}, "'atp' refuses keep=4"),
    ],
)
def test_what_cannot_be_meant(method, options, said):
    with pytest.raises(ValueError, match=said):
        spec.build(method, options)


@pytest.mark.parametrize("methods", [{"fopru": 3}, {"fopru", "fastv"}, 5, None])
def test_what_has_no_order_or_says_more_is_no_list_of_methods(methods):
    with pytest.raises(TypeError, match=f"or a list of them, not {type(methods).__name__}"):
        spec.build(methods, {"fopru.keep": 4})


def test_jobs_share_options():
    made = spec.jobs(["fopru", "fastv"], [{"keep": 4}, {"keep": 0.5}], {"layer": 2, "fastv.rows": "all"})
    assert [(job.method, job.options) for job in made] == [
        ("fopru", {"keep": 4, "layer": 2}), ("fastv", {"keep": 4, "layer": 2, "rows": "all"}),
        ("fopru", {"keep": 0.5, "layer": 2}), ("fastv", {"keep": 0.5, "layer": 2, "rows": "all"}),
    ]  # fmt: skip
    assert [job.label for job in made[:2]] == ["fopru, keep 4", "fastv, keep 4"]


def test_a_budget_of_a_methods_own_is_instead_of_the_shared_ones():
    own = {"fopru.keep": 8, "fastv.keep": 4}
    made = spec.jobs(["fopru+fastv", "random"], [{"keep": 5}, {"keep": 6}], own)
    assert (made[0].budget, made[0].label) == ("8 + 4", "fopru+fastv, fopru.keep 8, fastv.keep 4")
    assert (made[1].budget, spec.Job("atp", {}).budget) == ("5", "-")
    assert [(job.method, job.options) for job in made] == [
        ("fopru+fastv", own), ("random", {"keep": 5}), ("random", {"keep": 6}),
    ]  # fmt: skip


def test_a_named_budget_goes_to_the_method_without_one():
    own = {"fopru.keep": 8}
    (made,) = spec.jobs(["fopru+fastv"], [{"keep": 4}], own)
    assert made.options == {"fastv.keep": 4} | own
    # transprune has a schedule of its own, which a budget that nobody named leaves alone
    for named, options in ((True, {"transprune.keep": 4} | own), (False, own)):
        (made,) = spec.jobs(["fopru+transprune"], [{"keep": 4}], own, named)
        assert made.options == options
    (fopru, fastv) = spec.jobs(["fopru", "fastv"], [{"keep": 4}], own)
    assert (fopru.options, fastv.options) == ({"keep": 8}, {"keep": 4})
    with pytest.raises(ValueError, match="keep= could mean any of"):
        spec.jobs(["fopru+fastv+random"], [{"keep": 4}], own)
    for methods in (["fopru"], ["fopru+fastv", "fopru"]):
        both = own | {"fastv.keep": 3} if len(methods) > 1 else own
        with pytest.raises(ValueError, match=r"keep 4 would go to nobody: fopru.keep 8.* is given too"):
            spec.jobs(methods, [{"keep": 4}], both)
        assert spec.jobs(methods, [{"keep": 4}], both, named=False)


@pytest.mark.parametrize(
    ("methods", "options", "said"),
    [
        (["fopru+fastv"], {}, r"fopru\+fastv: keep= could mean any of"),
        (["fopru"], {"fastv.layer": 2}, "'fastv' is not one of the methods fopru"),
        (["fopru", "random"], {"seeed": 2}, "'fopru' and 'random' has no option 'seeed'. Did you mean 'seed'"),
        (["fopru"], {"layer": 2, "fopru.layer": 3}, "fopru.layer= is given twice"),
        (["none"], {}, "'none' is the whole model"),
        (["atp"], {}, "'atp' has no budget keep: how many tokens stay"),
    ],
)
def test_jobs_that_cannot_be_meant(methods, options, said):
    with pytest.raises(ValueError, match=said):
        spec.jobs(methods, [{"keep": 4}], options)


def test_flags_given_twice():
    with pytest.raises(vlmprune.runtime.errors.UserError, match="--option tau is given twice"):
        flags.options_of(["tau=None", "tau=0.1"])


@pytest.mark.parametrize(("keep", "said"), [(1, "keep=1.0 is all of them"), (3, "3 patches"), (4, None), (1.0, None)])
def test_few_patches_are_hardly_meant(keep, said):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        spec.build("random", {"keep": keep})
    told = [str(w.message) for w in found if issubclass(w.category, SmallBudgetWarning)]
    assert len(told) == (said is not None)
    assert said is None or said in told[0]


@pytest.mark.parametrize("name", registry.names())
def test_a_bad_value_names_its_option(name):
    """Nothing that text can say is taken for something else, or ends in an error that names nothing."""
    cls = registry.find(name)
    for option in registry.options(cls):
        base = {"keep": 0.5} if "keep" in registry.options(cls) and option not in spec.BUDGETS else {}
        base |= {name: value for name, value in cls.plain_with.items() if name != option}
        for value in ("x", ("a",), (), -1.5, float("inf"), float("nan")):
            with pytest.raises((TypeError, ValueError, UnsupportedError, FileNotFoundError)) as error:
                spec.build(name, base | {option: value})[0].cuts(NEXT)
            assert option in str(error.value), (option, value)


# A method that checks nothing itself


@dataclass(frozen=True)
class Careless(Method):
    """Has a budget and a switch, and a `__post_init__` that forgets the base's."""

    keep: int | float
    fast: bool = False
    average: float | None = None

    def __post_init__(self):
        pass


@pytest.mark.parametrize("keep", [8.0, 2.5, 0, -1, True, "9", None])
def test_no_author_has_to_check_budgets(keep):
    with pytest.raises((TypeError, ValueError), match="keep"):
        spec.build(Careless(keep), {})


def test_what_an_author_need_not_check():
    assert spec.build(Careless(9, average=None), {})
    with pytest.raises(TypeError, match="fast='off' must be True or False"):
        spec.build(Careless(9, fast="off"), {})
    with pytest.raises(TypeError, match="average='x'"):
        spec.build(Careless(9, average="x"), {})


@pytest.mark.parametrize("file", ["docs/tutorials/own-method.md", "CONTRIBUTING.md"])
def test_the_example_of_a_method_runs_as_printed(file, monkeypatch):
    """8.0 and 2.5 kept everything once."""
    (code,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), re.DOTALL)
        if "class Longest" in block
    )
    known = dict(registry.registered())
    try:
        monkeypatch.setitem(sys.modules, "example", module := ModuleType("example"))
        exec(compile(code, file, "exec"), module.__dict__)
        model = tiny.shared()
        with vlmprune.patch(model, "longest", keep=5) as handle:
            model(**tiny.prompt(model, [2, "image", 3], [(24, 24)]))
        assert len(handle.trace.kept()) == 5
        for bad in (8.0, 2.5, 0, "8", True, None):
            with pytest.raises((TypeError, ValueError), match="keep"):
                module.Longest(keep=bad)
    finally:
        registry.registered().clear()
        registry.registered().update(known)


# Files


def test_a_mistake_is_told_once_and_hides_no_other(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(
        "model: scene-llava\ntasks: [any]\nmethods: [fopro, {name: todre, taw: null}, {name: fopru, keep: 7.5}]\n"
        "keep: [0, true]\n"
    )
    with pytest.raises(Mistakes) as error:
        config.load_config(path)
    told = [what for _, what in error.value.found]
    assert len(told) == 5
    for words in ("keep=7.5", "keep=0 keeps", "keep=True is not", "unknown method 'fopro'", "no option 'taw'"):
        assert sum(words in what for what in told) == 1, words


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{name: fopru, keep: null}", "keep is null, which is no budget"),
        ("{name: todre, tau: None}", "write null for no value"),
        ("{name: fopru+fastv, keep: 4}", "name: [{name: fopru, keep: 64}, ...]"),
    ],
)
def test_null_in_yaml(entry, words, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(f"model: scene-llava\ntasks: [any]\nmethods: [{entry}]\nkeep: 9\n")
    with pytest.raises(Mistakes, match=re.escape(words)) as error:
        config.load_config(path)
    assert len(error.value.found) == 1


def test_joined_names_in_yaml(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("model: scene-llava\ntasks: [any]\nmethods: [atp+fopru]\nkeep: 9\n")
    (setting,) = config.load_config(path).settings
    assert [part.name for part in setting.methods[0].parts] == ["atp", "fopru"]
