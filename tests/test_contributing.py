"""CONTRIBUTING: its map shows every file, its examples run."""

from __future__ import annotations

import inspect
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import scenes
import tiny
import tiny_folders
import torch

import vlmprune
import vlmprune.cli as command
from vlmprune import Cut, Decoder, Method, methods, registry
from vlmprune.cli.flags import Verb
from vlmprune.methods.fastv import FastV
from vlmprune.methods.fopru import FoPru
from vlmprune.parts import select
from vlmprune.patches import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def mapped() -> list[str]:
    """The files that the map names, in its order."""
    block = next(block for block in re.findall(r"```\n(.*?)```", TEXT, re.DOTALL) if "vlmprune/kernels/" in block)
    found, room = [], ""
    for line in block.splitlines():
        name = line.split()[0]
        assert len(line.split()) > 1 or name == "vlmprune/", f"{name} has no words"
        if line[0] != " ":
            room = name
            assert (ROOT / room).is_dir() or room == "tests_real/", room
        else:
            found.append(room + name)
    return found


def test_the_map_shows_every_file_once():
    files = {
        str(path.relative_to(ROOT))
        for room in ("vlmprune", "patches", "eval")
        for path in (ROOT / room).rglob("*.py")
        if path.name != "__init__.py" or path.parent == ROOT / "vlmprune"
    }
    named = mapped()
    assert len(set(named)) == len(named)
    assert sorted(files - set(named)) == [], "the map in CONTRIBUTING.md lacks these"
    assert sorted(set(named) - files) == [], "the map in CONTRIBUTING.md has these, which are gone"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:[\w]+/)+[\w.]+(?:\.py|\.md|\.sh|/))`", TEXT))))
def test_what_it_names_is_there(path):
    assert any((ROOT / base / path).exists() or "longest" in path for base in ("", "vlmprune"))


@pytest.mark.parametrize("file", [*ROOT.glob("docs/**/*.md"), *ROOT.glob("scripts/*.sh"), ROOT / "README.md"])
def test_files_that_other_pages_and_scripts_name_are_there(file):
    named = re.findall(
        r"(?<![\w/.~-])((?:tests|scripts|vlmprune|patches|eval)/[\w/]+\.(?:py|sh|md|yaml))", file.read_text()
    )
    assert [name for name in named if not any((ROOT / base / name).exists() for base in ("", "vlmprune"))] == []
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", file.read_text()) if file.suffix == ".md" else []
    assert [link for link in links if not (file.parent / link).exists()] == []


def test_every_method_has_its_line_among_the_pages():
    index = (ROOT / "docs" / "methods" / "README.md").read_text(encoding="utf-8")
    lines = "".join(line for line in index.splitlines(keepends=True) if line.startswith("| ["))
    assert set(re.findall(r"`(\w+)`", lines)) == ours(), "docs/methods/README.md has a line for each"
    for page in re.findall(r"\]\((\w+\.md)\)", lines):
        assert (ROOT / "docs" / "methods" / page).is_file()


def test_every_family_beyond_llava_is_on_the_page_of_families():
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    others = [kind for kind in FAMILIES if kind not in tiny.CLASSES and not kind.startswith("llava_")]
    assert [kind for kind in others if f"`{kind}`" not in page] == [], "docs/families.md: a row and a section"


def ours() -> set[str]:
    """The methods of this package, not of others that happen to be installed."""
    return {cls.name for cls in map(methods.__dict__.get, methods.__all__) if cls.name}


@pytest.fixture
def example(monkeypatch):
    """`example(word)`: the module that the one example with this word is."""

    def made(word: str) -> ModuleType:
        (code,) = (block for block in BLOCKS if word in block)
        monkeypatch.setitem(sys.modules, "example", module := ModuleType("example"))
        exec(compile(code, "CONTRIBUTING.md", "exec"), module.__dict__)
        return module

    return made


def test_its_method_keeps_the_longest(example, monkeypatch):
    monkeypatch.setattr("vlmprune.methods.base.REGISTERED", dict(registry.registered()))
    longest = example("Longest(Pruner)").Longest
    model = tiny.shared(dtype=torch.float64)
    prompt = tiny.prompt(model, [2, "image", 3], [(24, 24)])
    with torch.no_grad():
        (features,) = model.model.get_image_features(prompt["pixel_values"], return_dict=True).pooler_output
        for norm, order in (("l2", 2), ("l1", 1)):
            with vlmprune.patch(model, longest(keep=5, norm=norm)) as handle:
                model(**prompt)
            want = features.norm(order, dim=-1).topk(5).indices.sort().values
            assert handle.trace.kept(0) == want.tolist()
    with pytest.raises(ValueError, match="l3"):
        longest(keep=5, norm="l3")


def test_its_family_is_computed_as_its_trace_says(example, monkeypatch):
    host = pytest.importorskip("transformers.models.video_llava.modeling_video_llava")
    if "pixel_values" not in inspect.signature(host.VideoLlavaModel.get_image_features).parameters:
        pytest.skip("the Video-LLaVA of this release calls its pictures otherwise")
    family = example("class VideoLlava").VideoLlava()
    monkeypatch.setitem(FAMILIES, "video_llava", family)
    monkeypatch.setitem(tiny.CLASSES, "video_llava", (host.VideoLlavaForConditionalGeneration, host.VideoLlavaConfig))
    monkeypatch.setattr(tiny, "SINGLE", (*tiny.SINGLE, "video_llava"))
    model = tiny.model("video_llava", dtype=torch.float64)
    prompt = tiny.prompt(model, [4, "image", 3, "image", 5], [(24, 24), (24, 24)])
    with torch.no_grad(), vlmprune.patch(model, [FoPru(keep=9), FastV(keep=5, layer=1)]) as handle:
        got = scenes.with_cache(model, prompt)[:, 0]
        features = tuple(model.model.get_image_features(prompt["pixel_values"], return_dict=True).pooler_output)
    with torch.no_grad():
        want, cut = scenes.replay(model, prompt, (features, ()), handle.trace)
        wrong, _ = scenes.replay(model, prompt, (features, ()), handle.trace, wrong=True)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert cut
    assert (got - wrong).abs().max() > 1e-7


def test_its_verb_prints_facts(example, cli, monkeypatch, tmp_path):
    module = example("vlmprune facts")
    command.command.command("facts", cls=Verb, epilog=module.EXAMPLES)(module.verb)
    try:
        code, out, err = cli("facts", "--model", tiny_folders.save(tmp_path), "--json")
        told = json.loads(out)
        assert (code, told["tower_layers"], told["decoder_layers"]) == (0, 6, 4), err
        code, out, _ = cli("facts", "--help")
        assert (code, module.EXAMPLES in out) == (0, True)
        assert cli("facts", "--model", "nowhere")[0] == 2
    finally:
        command.command.registered_commands.pop()


def test_its_taps_measure_what_they_say(example):
    taps, seen_by = example("KeyLength"), {}

    @dataclass(frozen=True)
    class Looking(Method):
        def cuts(self, facts):
            see = (taps.KeyLength(facts.feature_layer), taps.Length(1))
            return [Cut(Decoder(1), see, self.reduce)]

        def reduce(self, seen, layout):
            seen_by.update({type(tap).__name__: value for tap, value in seen.items()})
            return select(next(iter(seen.values())), 4, layout)

    model = tiny.shared(dtype=torch.float64)
    prompt = tiny.prompt(model, [2, "image", 3], [(24, 24)])
    with torch.no_grad(), vlmprune.patch(model, Looking()):
        model(**prompt)
    with torch.no_grad():
        hidden = model(**prompt, output_hidden_states=True).hidden_states[1][0, 2:18]
        tower = model.model.vision_tower
        layer = tower.encoder.layers[4]
        states = tower(prompt["pixel_values"], output_hidden_states=True).hidden_states[4]
        keys = layer.self_attn.k_proj(layer.layer_norm1(states))[0, 1:].unflatten(-1, (3, -1))
    torch.testing.assert_close(seen_by["KeyLength"][0].double(), keys.norm(dim=-1).mean(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen_by["Length"][0].double(), hidden.norm(dim=-1), rtol=1e-5, atol=1e-6)
