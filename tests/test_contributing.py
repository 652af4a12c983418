"""CONTRIBUTING: its map shows every file, its examples run."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import tiny
import torch

import vlmprune
from vlmprune import Cut, Decoder, Method
from vlmprune.parts.selection import select

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
    assert sorted(files - set(named)) == [], "the map lacks these"
    assert sorted(set(named) - files) == [], "the map has these, which are gone"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:[\w]+/)+[\w.]+(?:\.py|\.md|/))`", TEXT))))
def test_what_it_names_is_there(path):
    assert any((ROOT / base / path).exists() or "longest" in path for base in ("", "vlmprune"))


@pytest.fixture
def taps(monkeypatch):
    (code,) = (block for block in BLOCKS if "KeyLength" in block)
    monkeypatch.setitem(sys.modules, "example", module := ModuleType("example"))
    exec(compile(code, "CONTRIBUTING.md", "exec"), module.__dict__)
    return module


def test_its_taps_measure_what_they_say(taps):
    seen_by = {}

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
