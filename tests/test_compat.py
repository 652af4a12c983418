"""The version gate, the broken torchvision, and what `import vlmprune` costs and leaves alone."""

import json
import os
import subprocess
import sys
import textwrap
from importlib import metadata, util
from pathlib import Path
from types import ModuleType

import pytest
from clocks import PATIENCE
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from vlmprune import _compat

IN_RANGE = ["5.20.0", "5.20.2", "5.23.0", "5.99.1", "5.21.0.dev0", "5.24.0rc1"]
OUT_OF_RANGE = ["4.57.6", "5.0.0", "5.2.0", "5.19.9", "6.0.0", "6.0.0.dev0", "10.5.1", "unreadable"]


def python(code: str, *paths: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, outside the checkout, with folders put before the installed packages."""
    # Not this process's environment: vlmprune is imported here, and would hide what its import does to one.
    env = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH") if name in os.environ}
    env |= {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", textwrap.dedent(code)]
    return subprocess.run(command, cwd=cwd, env=env, text=True, capture_output=True, timeout=PATIENCE)


def distribution(folder: Path, name: str, version: str, *requires: str) -> None:
    """Write the metadata of an installed package."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


def torchvision(folder: Path, code: str, version: str = "0.28.0", torch: str = "2.13.0") -> Path:
    """Write a torchvision that runs this code when it is imported."""
    package = folder / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(code)
    distribution(folder, "torchvision", version, "numpy", f"torch=={torch}", "pillow!=8.3.*,>=5.3.0")
    return package


BROKEN = "raise RuntimeError('operator torchvision::nms does not exist')\n"


# The transformers range


def test_declared_and_checked_range_agree() -> None:
    declared = [Requirement(r) for r in metadata.requires("vlmprune") or []]
    specifier = next(r.specifier for r in declared if r.name == "transformers")
    assert specifier == SpecifierSet(_compat.SUPPORTED_TRANSFORMERS)
    readable = [v for v in IN_RANGE + OUT_OF_RANGE if v != "unreadable"]
    assert [v for v in readable if specifier.contains(v, prereleases=True)] == IN_RANGE


@pytest.mark.parametrize("version", IN_RANGE)
def test_supported_transformers_pass(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(_compat, "_transformers_version", lambda: version)
    _compat.check_transformers()


@pytest.mark.parametrize("version", OUT_OF_RANGE)
def test_other_transformers_are_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(_compat, "_transformers_version", lambda: version)
    with pytest.raises(ImportError) as raised:
        _compat.check_transformers()
    for part in (f"found {version}.", "supports transformers >=5.20,<6", "pip install 'transformers>=5.20,<6'"):
        assert part in str(raised.value)


def test_no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    monkeypatch.setattr(_compat, "_distribution_version", lambda name: None)
    monkeypatch.setattr(_compat.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="found none"):
        _compat.check_transformers()


def test_an_imported_transformers_speaks_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("transformers")
    module.__version__ = "4.1.0"
    monkeypatch.setitem(sys.modules, "transformers", module)
    with pytest.raises(ImportError, match=r"found 4\.1\.0"):
        _compat.check_transformers()


@pytest.mark.parametrize(("version", "good"), [("5.22.0", True), ("4.50.0", False)])
def test_a_source_folder_without_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, good: bool
) -> None:
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text(f"__version__ = {version!r}\n")
    monkeypatch.setattr(_compat, "_distribution_version", lambda name: None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        if good:
            _compat.check_transformers()
        else:
            with pytest.raises(ImportError, match=r"found 4\.50\.0"):
                _compat.check_transformers()
    finally:
        sys.modules.pop("transformers", None)


@pytest.mark.parametrize("version", ["4.57.6", "5.19.1", "6.0.0"])
def test_importing_vlmprune_beside_a_wrong_transformers(tmp_path: Path, version: str) -> None:
    distribution(tmp_path, "transformers", version)
    done = python("import vlmprune", tmp_path, cwd=tmp_path)
    assert done.returncode == 1
    assert f"ImportError: vlmprune supports transformers >=5.20,<6, and found {version}." in done.stderr


def test_the_check_imports_nothing(tmp_path: Path) -> None:
    code = """
        import sys, runpy, importlib.util
        file = importlib.util.find_spec("vlmprune").submodule_search_locations[0] + "/_compat.py"
        compat = runpy.run_path(file)
        compat["check_transformers"]()
        compat["check_torchvision"]()
        print(sorted({"transformers", "torch", "torchvision", "numpy", "packaging"} & set(sys.modules)))
    """
    done = python(code, cwd=tmp_path)
    loaded = [] if util.find_spec("torchvision") is None else ["numpy", "torch"]
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout.replace("'", '"'))) <= set(loaded)


# A torchvision that is there and broken


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (BROKEN, "(RuntimeError: operator torchvision::nms does not exist)"),
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "(OSError: libcudart.so.13: cannot open"),
        ("import a_module_that_is_not_there", "(ModuleNotFoundError: No module named 'a_module_that_is_not_there')"),
    ],
)
def test_broken_torchvision_is_explained(tmp_path: Path, code: str, reason: str) -> None:
    torchvision(tmp_path, code)
    done = python("import vlmprune", tmp_path, cwd=tmp_path)
    assert done.returncode == 1
    message = done.stderr.rpartition("\nImportError: ")[2]
    for part in ("torchvision 0.28.0", f"torch {metadata.version('torch')}", reason, "pip uninstall torchvision"):
        assert part in message


@pytest.mark.parametrize(("torch", "said"), [("2.13.0", False), ("2.14.0", True)])
def test_the_message_says_which_torch_torchvision_wants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch: str, said: bool
) -> None:
    distribution(tmp_path, "torchvision", "0.28.0", "numpy", f"torch=={torch}")
    distribution(tmp_path, "torch", "2.13.0+cpu")
    monkeypatch.syspath_prepend(tmp_path)
    message = _compat._torchvision_message(RuntimeError("no nms\nand more"))
    assert "next to torch 2.13.0+cpu" in message
    assert "(RuntimeError: no nms)" in message
    assert (f"asks for torch {torch}" in message) is said


def test_transformers_alone_does_not_explain_it(tmp_path: Path) -> None:
    """Why the check exists: when this fails because transformers says it better, the check can go."""
    torchvision(tmp_path, BROKEN)
    done = python("from transformers import LlavaForConditionalGeneration", tmp_path, cwd=tmp_path)
    assert done.returncode == 1
    assert "uninstall" not in done.stderr.rpartition("\n\n")[2]


def test_a_torchvision_that_imports_is_fine(tmp_path: Path) -> None:
    """It has no compiled operators here: only importing it can tell."""
    torchvision(tmp_path / "fake", "works = True\n")
    code = f"""
        import sys
        from vlmprune import _compat
        sys.path.insert(0, {str(tmp_path / "fake")!r})
        _compat.check_torchvision()
        print(sys.modules["torchvision"].works)
    """
    done = python(code, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


OPERATORS = """
    import sys, torch
    from vlmprune import _compat
    keep = []
    def load_library(path):
        assert path.name == "_C.so"
        if {loads}:
            keep.append(torch.library.Library("torchvision", "DEF"))
            keep[0].define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        else:
            raise OSError("libtorch_cuda.so: cannot open shared object file")
    torch.ops.load_library = load_library
    sys.path.insert(0, {folder!r})
    _compat.check_torchvision()
    print("torchvision" in sys.modules)
"""


@pytest.mark.parametrize("loads", [True, False])
def test_healthy_operators_spare_the_import(tmp_path: Path, loads: bool) -> None:
    package = torchvision(tmp_path / "fake", BROKEN)  # would be noticed, if it were imported
    (package / "_C.so").touch()
    done = python(OPERATORS.format(loads=loads, folder=str(tmp_path / "fake")), cwd=tmp_path)
    if loads:
        assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
    else:
        assert "ImportError: torchvision 0.28.0 is installed but cannot be imported" in done.stderr


def test_a_hidden_torchvision_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    _compat.check_torchvision()


# What `import vlmprune` costs and touches

#: Extras, and the parts of transformers that take seconds: whoever loads a model has them, `vlmprune --help` must not.
HEAVY = ["lmms_eval", "matplotlib", "sklearn", "datasets", "pandas", "vlmprune.eval", "transformers.modeling_utils"]


def test_import_loads_nothing_heavy(tmp_path: Path) -> None:
    code = f"""
        import sys, torch, transformers
        before = set(sys.modules)
        import vlmprune
        print([name for name in {HEAVY} if name in sys.modules and name not in before])
    """
    done = python(code, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_packages_that_users_name_need_no_import_of_their_own(tmp_path: Path) -> None:
    code = "import vlmprune; vlmprune.kernels.use('auto'); print(vlmprune.methods.ToDRE.__name__)"
    done = python(code, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "ToDRE\n"), done.stderr


def test_import_adds_little_time(tmp_path: Path) -> None:
    """CPU seconds, next to torch and transformers; the best of three, since machines are noisy."""
    code = """
        import time
        start = time.process_time()
        import torch, transformers
        middle = time.process_time()
        import vlmprune
        print(middle - start, time.process_time() - middle)
    """
    added = []
    while len(added) < 3 and min(added, default=1.0) > 0.15:
        done = python(code, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        base, ours = map(float, done.stdout.split())
        added.append(ours / base)
    assert min(added) <= 0.15


TOUCHED = """
    import json, os, sys, types, warnings, torch
    import transformers.models.clip.modeling_clip, transformers.models.siglip.modeling_siglip
    import transformers.models.llama.modeling_llama, transformers.models.mistral.modeling_mistral
    import transformers.models.qwen2.modeling_qwen2, transformers.models.llava.modeling_llava
    import transformers.models.llava_next.modeling_llava_next, transformers.processing_utils

    def state():
        '''Every function and class that torch and transformers hold, and what a process shares.'''
        found = {{}}
        for name, module in list(sys.modules.items()):
            if module is None or name.partition(".")[0] not in ("torch", "transformers"):
                continue
            for key, value in list(vars(module).items()):
                if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
                    found[name, key] = value
                if isinstance(value, type) and value.__module__ == name:
                    found |= {{(name, key, inner): item for inner, item in vars(value).items() if callable(item)}}
        shared = torch.nn.modules.module
        found["hooks"] = [len(v) for k, v in vars(shared).items() if k.startswith("_global_") and hasattr(v, "__len__")]
        found["environment"] = dict(os.environ)
        found["warnings"] = list(warnings.filters)
        found["torch"] = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())
        return found

    def action_changes(action):
        before = state()
        assert len(before) > 10_000
        exec(action)
        after = state()
        return sorted(str(key) for key in before if before[key] != after.get(key))

    print(json.dumps([action_changes(action) for action in {actions}]))
"""

#: Each of these must be noticed, or the first test says nothing.
NOTICED = [
    "transformers.models.llava.modeling_llava.LlavaModel.forward = print",
    "transformers.masking_utils.create_causal_mask = print",
    "torch.nn.modules.module.register_module_forward_hook(print)",
    "os.environ['SOMETHING_NEW'] = '1'",
]


def test_import_patches_nothing(tmp_path: Path) -> None:
    done = python(TOUCHED.format(actions=["import vlmprune", *NOTICED]), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ours, *others = json.loads(done.stdout)
    assert ours == []
    assert all(others), others
