"""What an author of a method imports: `vlmprune.parts`, one line beside the base class."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from vlmprune import parts

ROOT = Path(__file__).parents[2] / "vlmprune"
#: Of methods that are variants of another one, whose file has their base.
VARIANTS = {"fastervlm": "vispruner", "globalcom2_fixed": "globalcom2", "prumerge_plus": "prumerge"}
METHODS = [*(ROOT / "methods").glob("[!_]*.py"), ROOT / "methods" / "atp" / "method.py"]


def imported(path: Path) -> dict[str, list[str]]:
    """Names by the module of ours that they come from."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    return {n.module: [alias.name for alias in n.names] for n in nodes if n.module.split(".")[0] == "vlmprune"}


@pytest.mark.parametrize("path", [p for p in METHODS if p.name != "base.py"], ids=lambda path: path.stem)
def test_a_method_has_one_import_beside_its_base(path):
    beside = {"vlmprune.methods.atp.modules", f"vlmprune.methods.{VARIANTS.get(path.stem)}"}
    base = {"vlmprune.methods.base"}
    assert base <= set(imported(path)) - beside <= base | {"vlmprune.parts"}


def test_exports_are_what_their_homes_export():
    told = imported(ROOT / "parts" / "__init__.py")
    assert sorted(name for names in told.values() for name in names) == sorted(parts.__all__) == dir(parts)
    assert set(told) == {f"vlmprune.{home}" for home in parts._HOMES}
    for home, names in told.items():
        for name in names:
            assert getattr(parts, name) is getattr(import_module(home), name)
    with pytest.raises(ImportError, match="import name 'nothing'"):
        exec("from vlmprune.parts import nothing")


def test_every_export_is_used_or_a_tap_or_for_taps_of_ones_own():
    used = {name for path in METHODS for name in imported(path).get("vlmprune.parts", [])}
    used |= {name for names in imported(ROOT / "methods" / "base.py").values() for name in names}
    # what a tap asks and computes with, rules for options, what users give
    rest = {"DecoderLayer", "Scene", "TowerLayer", "Visible", "attention_mass", "is_whole", "last_rows", "mean_weight"}
    rest |= {"Clip", "capped", "greedy_diversity", "most_apart", "share"} | set(
        import_module("vlmprune.parts.taps").__all__
    )
    assert set(parts.__all__) - used == rest - used, "`parts/__init__.py` exports what methods import, and every tap"


def test_parts_know_no_host_and_bring_their_operations():
    code = (
        "import sys, torch; from vlmprune.parts import select; print(torch.ops.vlmprune.top_k); "
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0
