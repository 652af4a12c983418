"""The version gate, the broken torchvision, and what `import vlmprune` costs and leaves alone."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from types import ModuleType

import leftovers
import pytest
import transformers
from clocks import PATIENCE
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import vlmprune
from vlmprune import _compat
from vlmprune.eval import testbed

IN_RANGE = ["5.20.0", "5.20.2", "5.23.0", "5.24.9", "5.21.0.dev0", "5.24.0rc1"]
TOO_OLD = ["4.36.2", "4.57.6", "5.0.0", "5.2.0", "5.19.9", "unreadable"]
TOO_NEW = ["5.25.0", "5.25.0.dev0", "5.99.1", "6.0.0", "10.5.1"]
SUPPORTED = f"vlmprune {vlmprune.__version__} supports transformers >=5.20,<5.25"


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
    readable = [v for v in IN_RANGE + TOO_OLD + TOO_NEW if v not in ("unreadable", "5.25.0.dev0")]
    assert [v for v in readable if specifier.contains(v, prereleases=True)] == IN_RANGE


def test_all_that_is_allowed_is_tested() -> None:
    """A range that is raised alone fails here: CI installs its newest release, `make test-versions` all minor ones."""
    root = Path(__file__).resolve().parents[1]
    pinned = re.search(r"^transformers==(\S+)$", (root / "constraints.txt").read_text(), re.M)[1]
    versions = re.search(r"^VERSIONS \?= (.*)$", (root / "Makefile").read_text(), re.M)[1].split()
    assert versions[-1] == pinned
    oldest, too_new = (int(minor) for minor in re.findall(r"5\.(\d+)", _compat.SUPPORTED_TRANSFORMERS))
    assert [version.rpartition(".")[0] for version in versions] == [f"5.{n}" for n in range(oldest, too_new)]


@pytest.mark.parametrize("version", IN_RANGE)
def test_supported_transformers_pass(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(_compat, "_transformers_version", lambda: version)
    _compat.check_transformers()


@pytest.mark.parametrize("version", TOO_OLD + TOO_NEW)
def test_other_transformers_are_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(_compat, "_transformers_version", lambda: version)
    with pytest.raises(ImportError) as raised:
        _compat.check_transformers()
    for part in (f"found {version}.", SUPPORTED, "pip install 'transformers>=5.20,<5.25'"):
        assert part in str(raised.value)
    for part in ("newer than any release it was tested with", "or a newer vlmprune"):
        assert (part in str(raised.value)) is (version in TOO_NEW)


@pytest.mark.parametrize(
    "verb", ["check", "run --image a.png --prompt b", "fidelity --images . --prompts b.txt", "demo"]
)
def test_the_command_refuses_another_release_in_one_line(tmp_path: Path, verb: str) -> None:
    distribution(tmp_path, "transformers", "5.25.0")
    (tmp_path / "b.txt").write_text("what is this ?")
    shutil.copy(testbed.pictures()[0]["file"], tmp_path / "a.png")
    ran = python(f"from vlmprune.cli import main; raise SystemExit(main({verb.split()}))", tmp_path, cwd=tmp_path)
    assert ran.returncode == 1
    said = next(line for line in ran.stderr.splitlines() if "loading" not in line)
    assert said.startswith(f"vlmprune: {SUPPORTED}")
    assert "Traceback" not in ran.stderr


def test_load_refuses_another_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compat, "_transformers_version", lambda: "5.25.0")
    with pytest.raises(ImportError, match=r"found 5\.25\.0\. That is newer"):
        vlmprune.load("scene-llava")


def test_patch_refuses_another_release(monkeypatch: pytest.MonkeyPatch, tiny_model: Callable) -> None:
    model = tiny_model()
    monkeypatch.setattr(transformers, "__version__", "5.25.1")
    with pytest.raises(ImportError, match=r"found 5\.25\.1\. That is newer"):
        vlmprune.patch(model, "random", keep=4)
    assert not leftovers.ours(model)


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


HOSTS = ["import vlmprune.patches.host", "vlmprune.patch", "from vlmprune import check", "import vlmprune.engine.hooks"]


@pytest.mark.parametrize("version", ["4.36.2", "5.25.0"])
def test_what_touches_a_model_is_refused_beside_another_transformers(tmp_path: Path, version: str) -> None:
    distribution(tmp_path, "transformers", version)
    code = f"""
        import vlmprune
        for code in {HOSTS}:
            try:
                exec(code)
            except ImportError as error:
                print(error)
    """
    done = python(code, tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert len(told) == len(HOSTS)
    assert all(line.startswith(f"{SUPPORTED}, and found {version}.") for line in told), told


@pytest.mark.parametrize("version", ["4.36.2", None])
def test_tensor_code_runs_beside_any_transformers(tmp_path: Path, version: str | None) -> None:
    """A serving engine with another release can choose tokens; not even an import of transformers is tried."""
    if version is not None:
        distribution(tmp_path, "transformers", version)
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    code = """
        import torch, vlmprune
        from vlmprune import kernels, methods, parts, registry, spec
        from vlmprune.parts import budget, cuts, layout, selection, taps, tracing
        made = spec.build("vtc_cls", {"keep": 3})[0]
        (cut,) = made.cuts(parts.ModelFacts("llava", 4, 2, True, 4, False, 16))
        grid = tracing.trace_packing(lambda x, newline: x[0], 1, 4, 4, (1, 1))
        token = torch.arange(16)[None]
        one = layout.Layout(
            grids=[grid], sample=[0], ordinal=[0], start=[0], position=token, alive=token >= 0,
            alive_counts=[16], alive_patches=[16], entered=[16], entered_patches=[16],
        )
        print(cut.reduce({cut.see[0]: token.double()}, one).keep.nonzero()[:, 1].tolist())
    """
    done = python(code, tmp_path, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "[13, 14, 15]\n"), done.stderr


def test_the_command_beside_another_transformers(tmp_path: Path) -> None:
    distribution(tmp_path, "transformers", "5.25.0")
    code = "from vlmprune.cli import main; print([main(a) for a in (['demo'], ['ls', 'methods'], ['--version'])])"
    done = python(code, tmp_path, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[1, 0, 0]", done.stderr
    assert f"vlmprune: {SUPPORTED}, and found 5.25.0." in done.stderr
    assert "Traceback" not in done.stderr


def test_the_check_imports_nothing(tmp_path: Path) -> None:
    code = """
        import sys
        from vlmprune import _compat
        _compat.check_transformers()
        _compat.check_torchvision()
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
