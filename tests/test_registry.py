"""Methods by name, their options, and methods of other packages."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest
import tiny

import vlmprune
from vlmprune import Method, registry, spec
from vlmprune.methods import FastV, FoPru, VtcCls, base
from vlmprune.methods.base import LOOKS_AT


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("fopro", "fopru"), ("vtc-cls", "vtc_cls"), ("FastV", "fastv"), ("rand", "random"), ("gird", "grid")],
)
def test_unknown_methods_get_a_suggestion(wrong, right):
    with pytest.raises(ValueError, match=rf"unknown method '{wrong}'.*Did you mean '{right}'") as error:
        vlmprune.patch(tiny.shared(), wrong, keep=4)
    for name in ("fopru", "vtc_cls", "fastv", "random", "grid", "pool"):
        assert name in str(error.value)


def test_a_name_like_nothing_gets_a_list_alone():
    with pytest.raises(ValueError, match="Known: ") as error:
        vlmprune.patch(tiny.shared(), "zzzzzzzz", keep=4)
    assert "Did you mean" not in str(error.value)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("fopru", {"keep": 4, "stratgy": "row"}, "Did you mean 'strategy'"),
        ("fopru", {"kep": 4}, "Did you mean 'keep'"),
        ("vtc_cls", {"keep": 4, "startlayer": 2}, "Did you mean 'start_layer'"),
        ("random", {"keep": 4, "strategy": "row"}, "no option 'strategy'"),
        (["vtc_cls", "fastv"], {"start_layr": 2}, "Did you mean 'start_layer'"),
    ],
)
def test_unknown_options_get_a_suggestion(method, options, said):
    with pytest.raises(ValueError, match=said):
        vlmprune.patch(tiny.shared(), method, **options)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fopru", {"strategy": "rows"}), ("fopru", {"score": "CLS"}), ("fopru", {"scope": "global"}),
        ("fopru", {"positions": "keep"}), ("fopru", {"newlines": "candidates"}), ("fopru", {"layer": 6}),
        ("fopru", {"layer": -7}), ("vtc_cls", {"ensemble": "median"}), ("vtc_cls", {"start_layer": 5}),
        ("vtc_cls", {"fallback": "cls"}), ("fastv", {"layer": 0}), ("fastv", {"layer": 4}),
        ("fastv", {"rows": "first"}),
        ("random", {"seed": -1}), ("grid", {"newlines": "some"}), ("pool", {"positions": "none"}),
    ],
)  # fmt: skip
def test_bad_values_name_the_option(method, options):
    (option,) = options
    with pytest.raises(ValueError, match=option):
        vlmprune.patch(tiny.shared(), method, keep=4, **options)


@pytest.mark.parametrize(
    ("method", "options"), [("fopru", {"layer": 1.5}), ("fastv", {"layer": "2"}), ("vtc_cls", {"start_layer": True})]
)
def test_bad_types_name_the_option(method, options):
    (option,) = options
    with pytest.raises(TypeError, match=option):
        vlmprune.patch(tiny.shared(), method, keep=4, **options)


@pytest.mark.parametrize("method", ["fopru", "vtc_cls", "random", "grid", "pool"])
def test_a_budget_is_needed(method):
    with pytest.raises(TypeError, match="keep="):
        vlmprune.patch(tiny.shared(), method)


@pytest.mark.parametrize("bad", [None, 3, [3], [], "", object(), FoPru])
def test_things_that_are_no_methods(bad):
    with pytest.raises((TypeError, ValueError), match="method"):
        vlmprune.patch(tiny.shared(), bad)


def test_build():
    assert spec.build("fopru", {"keep": 4}) == [FoPru(keep=4)]
    assert spec.build(FoPru(keep=4), {}) == [FoPru(keep=4)]
    both = spec.build(["vtc_cls", FastV(keep=0.5)], {"keep": 9, "start_layer": 2})
    assert both == [VtcCls(keep=9, start_layer=2), FastV(keep=0.5)]
    with pytest.raises(ValueError, match="could mean any of 'vtc_cls', 'fastv'"):
        spec.build(["vtc_cls", "fastv"], {"keep": 9})
    with pytest.raises(TypeError, match="method object"):
        spec.build(FoPru(keep=4), {"keep": 5})


def test_names_are_unique_and_kept():
    @dataclass(frozen=True)
    class Mine(Method):
        pass

    with pytest.raises(ValueError, match="registered already"):
        vlmprune.register("fopru")(Mine)
    assert registry.find("fopru") is FoPru


@pytest.mark.parametrize("name", registry.names())
def test_every_method_describes_itself(name):
    """`vlmprune ls methods` prints this."""
    method = registry.find(name)
    assert method.name == name
    assert method.summary
    assert not method.summary.endswith(".")
    assert method.looks_at in filter(None, LOOKS_AT), "looks_at must be a key of LOOKS_AT, the heading of its line"
    assert isinstance(method.syncs, int)
    assert method.__doc__


PLUGIN = '''
from dataclasses import dataclass
import torch
from vlmprune import Cut, Decoder, Method, Reduction

@dataclass(frozen=True)
class EveryOther(Method):
    """Keep every `step`-th token."""
    summary = "every other token"
    keep: int = 2

    def cuts(self, facts):
        return [Cut(Decoder(1), (), self.reduce)]

    def reduce(self, seen, layout):
        return Reduction(layout.alive & (torch.arange(layout.width) % self.keep == 0))
'''


@pytest.fixture
def install(tmp_path, monkeypatch):
    """`install("every_other")`: another package that offers a method under that name."""
    monkeypatch.setattr(base, "REGISTERED", dict(base.REGISTERED))

    def make(name):
        (tmp_path / "othermethods.py").write_text(PLUGIN)
        info = tmp_path / "othermethods-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: othermethods\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[vlmprune.methods]\n{name} = othermethods:EveryOther\n")
        monkeypatch.syspath_prepend(tmp_path)

    yield make
    sys.modules.pop("othermethods", None)


def test_another_package_adds_a_method(install, tiny_model):
    install("every_other")
    assert "every_other" in registry.names()
    assert "othermethods" not in sys.modules, "listing names must not import other packages"
    model = tiny_model()
    with vlmprune.patch(model, "every_other", keep=3) as handle:
        model(**tiny.prompt(model, [2, "image", 3], [(24, 24)]))
    assert handle.trace.kept() == [0, 3, 6, 9, 12, 15]
    assert handle.trace.cuts[0].method == "every_other"
    with pytest.raises(ValueError, match="Did you mean 'every_other'"):
        vlmprune.patch(model, "evry_other")


def test_another_package_cannot_take_our_names(install):
    install("fopru")
    assert registry.find("fopru") is FoPru
    assert registry.names().count("fopru") == 1
    assert "othermethods" not in sys.modules
