"""The house: which room may look into which, and where data may ride beside the calls."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"vlmprune": ROOT / "vlmprune", "vlmprune.patches": ROOT / "patches", "vlmprune.eval": ROOT / "eval"}
FLOORS = ("kernels", "parts", "patches", "engine", "runtime", "eval", "cli")
#: What may be seen from everywhere, because it sees nothing of ours but each other.
GROUND = {"_compat", "_version", "embedded", "errors"}
#: Rooms beside the floors, and what each may see besides the ground.
BESIDE = {
    "trace": {"parts"},
    "methods": {"parts"},
    "registry": {"methods"},
    "yamls": set(),
    "recipe": {"methods", "registry", "spec", "yamls"},
    "cost": {"engine", "kernels", "methods", "parts", "patches"},
    "spec": {"methods", "registry", "parts"},
    "api": {"cost", "engine", "kernels", "methods", "parts", "patches", "recipe", "registry", "spec", "trace"},
    # a host of its own: what hooks into transformers is not for it
    "serving": {"engine", "methods", "parts", "patches", "registry", "spec", "trace", "kernels"},
    "vllm": {"serving"},
    "verify": {"api", "engine", "methods", "parts", "patches", "registry", "spec", "trace", "kernels"},
}
#: What a floor may see besides those below it.
ALSO = {
    "engine": {"trace", "methods"},  # of methods the base class alone
    "runtime": {"api", "recipe", "registry", "spec", "trace", "verify", "methods"},
    "eval": {"api", "cost", "recipe", "registry", "serving", "spec", "vllm", "trace", "verify", "methods", "yamls"},
    "cli": {"api", "cost", "recipe", "registry", "serving", "spec", "vllm", "trace", "verify", "methods", "yamls"},
}
#: Who may name what rides beside the calls: through transformers, through vLLM, and the help that tells of the latter.
DECLARE = {"vlmprune.engine.channels", "vlmprune.serving.settings", "vlmprune.cli.serve"}
#: Of the engine, what serving may use: checks, plans and merging, which need no supported transformers.
PLANS = {f"vlmprune.engine.{name}" for name in ("compile", "decided", "plan", "tower")}


def modules() -> dict[str, Path]:
    found = {}
    for prefix, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = [part for part in path.relative_to(folder).with_suffix("").parts if part != "__init__"]
            found[".".join([prefix, *parts])] = path
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def nodes_of(path: Path, types: bool) -> Iterator[ast.AST]:
    """All nodes of a module, or those that run: without what is imported for types alone."""
    left: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while left:
        node = left.pop()
        yield node
        if types or not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            left += ast.iter_child_nodes(node)


def imports(module: str, path: Path, known: dict[str, Path], types: bool = True) -> Iterator[str]:
    """Modules of ours that a module imports, at its top or inside a function; by default for types too."""
    for node in nodes_of(path, types):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and arg.value in known)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "vlmprune")
        elif isinstance(node, ast.ImportFrom):
            home = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
            start = ".".join(home[: len(home) - node.level + 1]) + "." if node.level else ""
            target = f"{start}{node.module or ''}".rstrip(".")
            if target.split(".")[0] == "vlmprune":
                yield from (f"{target}.{a.name}" if f"{target}.{a.name}" in known else target for a in node.names)


def allowed(floor: str) -> set[str]:
    below = set(FLOORS[: FLOORS.index(floor)]) if floor in FLOORS else BESIDE[floor]
    return {floor} | GROUND | below | ALSO.get(floor, set())


KNOWN = modules()


@pytest.mark.parametrize("module", sorted(name for name in KNOWN if room(name) not in {"", "__main__", *GROUND}))
def test_arrows_go_one_way(module):
    seen = {target for target in imports(module, KNOWN[module], KNOWN) if target != "vlmprune"}
    wrong = sorted(target for target in seen if room(target) not in allowed(room(module)))
    if module.startswith("vlmprune.methods.atp.training"):  # which patches and runs a model
        wrong = [target for target in wrong if room(target) not in {"api", "patches", "trace"}]
    if room(module) == "engine":
        assert {target for target in seen if room(target) == "methods"} <= {"vlmprune.methods.base"}
    if room(module) == "serving":
        assert {target for target in seen if room(target) == "engine"} <= PLANS
    assert not wrong


def test_only_one_file_takes_anything_from_vllm():
    for module, path in KNOWN.items():
        text = path.read_text(encoding="utf-8")
        found = re.findall(r"^ *(?:from|import) vllm\b(.*)", text, re.MULTILINE)
        assert not found or module in ("vlmprune.serving.host", "vlmprune.serving.plugin"), module
        if module == "vlmprune.serving.plugin":
            assert found == [" import ModelRegistry"]


@pytest.mark.parametrize("module", sorted(GROUND))
def test_the_ground_sees_nothing(module):
    seen = set(imports(f"vlmprune.{module}", KNOWN[f"vlmprune.{module}"], KNOWN))
    assert {room(target) for target in seen} <= GROUND


def circles(seen: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, or look into one."""
    left = dict(seen)
    while done := [module for module, targets in left.items() if not targets & set(left)]:
        for module in done:
            del left[module]
    return sorted(left)


def test_no_import_hides_a_circle():
    """Nor does one inside a function or by name: none would be needed to break a circle."""
    seen = {name: set(imports(name, path, KNOWN, types=False)) - {name, "vlmprune"} for name, path in KNOWN.items()}
    assert sum(map(len, seen.values())) > 400
    assert circles(seen) == []


def test_a_circle_would_be_seen(tmp_path):
    path = tmp_path / "lazy.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vlmprune.cli import run\n"
        "def f():\n    import_module('vlmprune.parts')\n    from vlmprune.parts import cuts\n"
    )
    found = set(imports("vlmprune.parts.lazy", path, KNOWN, types=False))
    assert found == {"vlmprune.parts", "vlmprune.parts.cuts"}
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def test_a_wrong_arrow_would_be_seen(tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text("def f():\n    from vlmprune.cli import run\n    from ..engine import hooks\n")
    seen = set(imports("vlmprune.parts.wrong", path, KNOWN))
    assert seen == {"vlmprune.cli.run", "vlmprune.engine.hooks"}
    assert not {room(target) for target in seen} & allowed("parts")


def classes(known: dict[str, Path]) -> dict[str, list[str]]:
    """The modules that have a class of a name."""
    found: dict[str, list[str]] = {}
    for module, path in sorted(known.items()):
        for node in nodes_of(path, types=True):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(module)
    return found


def test_a_class_name_says_which_thing_it_is():
    found = classes(KNOWN)
    assert len(found) > 150
    assert {name: homes for name, homes in found.items() if len(homes) > 1} == {}


def test_only_channels_names_what_rides_beside_the_calls():
    from vlmprune.engine import channels

    named = {getattr(channels, name) for name in channels.__all__ if isinstance(getattr(channels, name), str)}
    assert named <= {channel.name for channel in channels.CHANNELS}
    for module, path in KNOWN.items():
        if module not in DECLARE:
            assert not re.search(r"""["']_?vlmprune_(?!scene)""", path.read_text(encoding="utf-8")), (
                module
            )  # but for tasks


def test_the_original_package_carries_the_channels_by_their_names():
    from dataclasses import fields

    from vlmprune.engine.channels import SEEN, SIZES
    from vlmprune.patches.llava_llama import Features, Prompt

    assert {SEEN, SIZES} <= {field.name for field in fields(Features)}
    assert SEEN in {field.name for field in fields(Prompt)}


def test_channels_say_who_writes_and_reads():
    from vlmprune.engine.channels import CHANNELS

    assert len({channel.name for channel in CHANNELS}) == len(CHANNELS) < 12
    assert all(channel.writer and channel.reader and channel.why for channel in CHANNELS)
