"""`vlmprune ls`."""

import json
from importlib import metadata

import pytest

from vlmprune import registry
from vlmprune.eval import testbed
from vlmprune.methods.base import LOOKS_AT
from vlmprune.patches import FAMILIES
from vlmprune.patches.language_models import LANGUAGE_MODELS
from vlmprune.patches.towers import TOWERS


class Point:
    """What an entry point looks like from outside."""

    value, group, dist = "other:Thing", registry.ENTRY_POINTS, None

    def __init__(self, name, load):
        self.name, self.load = name, load


@pytest.fixture
def broken_plugin(monkeypatch):
    """A method of another package, whose import fails."""

    def load():
        raise OSError("libthing.so: cannot open")

    real, point = metadata.entry_points, Point("thing", load)

    def entry_points(**wanted):
        if wanted.get("group") != registry.ENTRY_POINTS:
            return real(**wanted)
        return [*real(**wanted), point] if wanted.get("name", "thing") == "thing" else real(**wanted)

    monkeypatch.setattr(metadata, "entry_points", entry_points)


def test_methods_text(cli):
    code, out, err = cli("ls", "methods")
    assert (code, err) == (0, "")
    for name in registry.names():
        cls = registry.find(name)
        (at,) = [i for i, line in enumerate(out.splitlines()) if line.startswith(f"{name}: ")]
        first, second = out.splitlines()[at : at + 2]
        assert cls.summary in first
        assert cls.paper in first
        assert f"needs {cls.needs}; stage {cls.stage}; positions " in second
        assert second.endswith(f"syncs {cls.syncs}; training {cls.training}")


def test_methods_stand_under_what_they_look_at(cli):
    lines, listed = cli("ls", "methods")[1].splitlines(), {}
    headings = {heading: group for group, heading in LOOKS_AT.items()}
    group = None
    for line in lines:
        group = headings.get(line.rpartition(" (")[0], group)
        if (name := line.partition(": ")[0]) in registry.names():
            listed.setdefault(group, []).append(name)
    for group in LOOKS_AT:
        mine = [name for name in registry.names() if registry.find(name).looks_at == group]
        assert listed.get(group, []) == mine
    assert {"fopru", "vtc_cls"} < set(listed["tower"])
    assert {"downsample", "grid", "pool", "random"} <= set(listed["nothing"])
    assert "other" not in " ".join(lines[:3])


def test_methods_of_others_need_not_say_what_they_look_at(cli, broken_plugin):
    lines = cli("ls", "methods")[1].splitlines()
    at = lines.index("others (1)")
    assert lines[at + 1].startswith("thing")


def test_methods_json(cli):
    found = {method["name"]: method for method in json.loads(cli("ls", "methods", "--json")[1])}
    assert sorted(found) == registry.names()
    assert found["fopru"]["paper"] == "arXiv 2411.14164"
    assert (found["fopru"]["positions"], found["fastv"]["positions"]) == ("family", "original")
    assert found["fopru"]["options"]["strategy"]["default"] == "rank"
    assert found["random"]["from"] == "vlmprune"


def test_methods_say_whether_vllm_can_be_given_them(cli):
    found = {method["name"]: method["vllm"] for method in json.loads(cli("ls", "methods", "--json")[1])}
    assert {name for name, told in found.items() if told == "yes"} >= {
        "divprune", "fopru", "grid", "pool", "random",
    }  # fmt: skip
    assert found["vtc_cls"].startswith("on llava, llava_next, internvl (on others not: vtc_cls reads the attention")
    assert found["todre"].startswith("on llava, llava_next, internvl with tau=None (on others not")
    assert found["tome"].startswith("on llava (on others not: tome merges views whole")
    assert found["fastv"].startswith("no: fastv cuts inside the language model")
    assert found["visionzip"].startswith("on llava, llava_next, llava_onevision (on others not: visionzip changes what")
    assert found["globalcom2"].startswith("no: how many tokens globalcom2 keeps is not known")
    assert found["globalcom2_fixed"].startswith("on llava_next (on others not")
    assert "with tau=None" in cli("ls", "methods")[1]


def test_one_method(cli):
    code, out, _ = cli("ls", "methods", "fopru")
    assert code == 0
    assert "strategy='rank'" in out
    assert "No code was published" in out  # the docstring
    assert "vtc_cls" not in out
    code, out, err = cli("ls", "methods", "fopro")
    assert (code, out) == (2, "")
    assert "Did you mean 'fopru'?" in err
    assert cli("ls", "models", "fopru")[0] == 2


def test_a_broken_plugin_does_not_break_the_list(cli, broken_plugin):
    code, out, _ = cli("ls", "methods")
    assert code == 0
    assert "thing [from other:Thing]\n    cannot be loaded: OSError: libthing.so: cannot open" in out
    assert "fopru: " in out
    listed = {method["name"]: method for method in json.loads(cli("ls", "methods", "--json")[1])}
    assert listed["thing"]["error"] == "OSError: libthing.so: cannot open"
    assert cli("ls", "models")[0] == 0


def test_running_a_broken_plugin(cli, broken_plugin, picture):
    code, out, err = cli("run", "--image", picture, "--prompt", "x", "--method", "thing")
    assert (code, out) == (2, "")
    assert "method 'thing' cannot be loaded: OSError: libthing.so" in err


def test_models(cli):
    code, out, _ = cli("ls", "models")
    assert code == 0
    for word in (*FAMILIES, *TOWERS, *LANGUAGE_MODELS, *testbed.NAMES):
        assert word in out
    about = json.loads(cli("ls", "models", "--json")[1])
    towers = {tower["model_type"]: tower for tower in about["towers"]}
    assert set(towers["clip_vision_model"]["refused_methods"]) == {"pixelprune"}
    assert "vtc_cls" in towers["siglip_vision_model"]["refused_methods"]
    assert "fopru" not in towers["siglip_vision_model"]["refused_methods"]
    assert "fallback='received'" in out
    told = about["families"][0]["refused_methods"].items()
    assert all("view" in why or name == "pixelprune" for name, why in told)
    assert set(about["families"][1]["refused_methods"]) == {"pixelprune"}
    assert [family["model_type"] for family in about["families"]] == list(FAMILIES)


def test_what_cannot_run_on_which_family_is_listed(cli):
    out = cli("ls", "models")[1]
    families = {f["model_type"]: f for f in json.loads(cli("ls", "models", "--json")[1])["families"]}
    onevision = families["llava_onevision"]
    assert {"vtc_cls", "globalcom2", "todre"} <= set(onevision["refused_methods"])  # by its usual tower
    merging = {"flowcut", "tome", "pitome", "visionzip", "prumerge", "prumerge_plus"}
    assert set(onevision["refused_inputs"]["videos"]) == merging | {"globalcom2", "globalcom2_fixed", "lrs", "showui"}
    assert set(onevision["refused_inputs"]["large images, whose canvas is shrunk"]) == merging | {"showui"}
    assert set(families["llava_next_video"]["refused_inputs"]) == {"videos"}
    assert families["llava_next"]["refused_inputs"] == families["llava"]["refused_inputs"] == {}
    assert (onevision["modalities"], families["vipllava"]["modalities"]) == (["image", "video"], ["image"])
    assert "images and videos; usual tower siglip_vision_model" in out
    assert "not tome on videos: tome merges patches inside the tower" in out


def test_missing_embedded_model_is_said_to_be_missing(cli, monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')

    def path(name):
        if name != "scene-llava":
            raise FileNotFoundError(f"the weights of {name} are missing")
        return tmp_path

    monkeypatch.setattr("vlmprune.embedded.path", path)
    out = cli("ls", "models")[1]
    assert "scene-llava: family llava" in out
    assert "scene-llava-next: missing: the weights of scene-llava-next are missing" in out


def test_what_a_search_may_set(cli):
    code, out, _ = cli("ls", "methods", "scope")
    assert (code, "`vlmprune tune --method scope` searches: alpha from 0 to 4" in out) == (0, True)
    assert "searches" not in cli("ls", "methods", "fopru")[1]


@pytest.mark.parametrize(
    ("name", "there", "left_out"),
    [
        ("fopru", ["positions", "newlines"], ["keep", "average"]),  # what its own docstring names
        ("divprune", ["positions"], ["newlines"]),
        ("prunesid", ["keep", "average", "positions", "newlines"], []),
        ("catp", ["average", "newlines"], ["question"]),
        ("atp", [], []),
    ],
)
def test_of_one_method_every_option_is_explained(cli, name, there, left_out):
    code, out, _ = cli("ls", "methods", name)
    assert code == 0
    shared = out.partition("As everywhere:\n")[2]
    assert [word for word in there if f"\n    {word}: " not in f"\n{shared}"] == []
    assert [word for word in left_out if f"\n    {word}: " in f"\n{shared}"] == []
