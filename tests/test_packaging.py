"""What the wheel, the source archive and an editable install put where."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import zipfile
from configparser import ConfigParser
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from clocks import PATIENCE
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import vlmprune
from vlmprune._version import __version__

ROOT = Path(__file__).resolve().parents[1]
#: Where each folder of the checkout is installed.
INSTALLED_AS = {
    "vlmprune": "vlmprune",
    "patches": "vlmprune/patches",
    "eval": "vlmprune/eval",
    "configs": "vlmprune/configs",
}
IMPORTED = ["vlmprune", "vlmprune.patches", "vlmprune.eval", "vlmprune.eval.testbed", "vlmprune.configs"]


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Run a command and return what it printed; fail with all of it."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | {"OMP_NUM_THREADS": "1"} | env,
        text=True,
        capture_output=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def checkout_files() -> list[str]:
    """The files a commit of everything would hold; in an unpacked source archive, all files."""
    git = shutil.which("git")
    if git and (ROOT / ".git").exists():
        listed = run(git, "ls-files", "-co", "--exclude-standard", "-z", cwd=ROOT).split("\0")
        return sorted(name for name in set(listed) if name and (ROOT / name).is_file())
    found = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    unwanted = {"__pycache__", "build", "dist", "vlmprune.egg-info"}
    return sorted(
        path.as_posix()
        for path in found
        if not unwanted & set(path.parts) and not path.parts[0].startswith((".venv", ".pytest_cache", ".ruff_cache"))
    )


def installed(files: list[str]) -> list[str]:
    """Where files of the checkout should be in site-packages."""
    split = [name.partition("/") for name in files]
    return sorted(f"{INSTALLED_AS[top]}/{rest}" for top, _, rest in split if top in INSTALLED_AS and rest)


def build(source: Path, out: Path, *what: str) -> Path:
    """Build with what is installed here: no network."""
    run(sys.executable, "-P", "-m", "build", "--no-isolation", *what, "--outdir", out, source, cwd=out.parent)
    return next(out.glob("*.whl"))


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return sorted(name for name in archive.namelist() if not name.endswith("/"))


def code_and_data(wheel: Path) -> list[str]:
    return [name for name in names(wheel) if ".dist-info/" not in name]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean checkout: no build folder of old, nothing ignored."""
    folder = tmp_path_factory.mktemp("checkout") / "source"
    for name in checkout_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, tmp_path_factory.mktemp("built") / "wheel", "--wheel")


@pytest.fixture(scope="module")
def described(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(f"vlmprune-{__version__}.dist-info/METADATA").decode())


def test_wheel_holds_every_file_and_no_other(wheel: Path) -> None:
    """A file that is missing here has an ending that setup.cfg's package_data does not list (or should be ignored)."""
    assert code_and_data(wheel) == installed(checkout_files())


def test_wheel_installs_only_vlmprune(wheel: Path) -> None:
    assert {name.partition("/")[0] for name in names(wheel)} == {"vlmprune", f"vlmprune-{__version__}.dist-info"}


def test_a_new_sub_package_needs_no_line_in_setup_cfg(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "source"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("*.egg-info", "build", "*.safetensors", "*.zip"))
    added = ["vlmprune/new/deep/__init__.py", "vlmprune/new/__init__.py", "eval/new/__init__.py", "eval/new/a/b.yaml"]
    for name in [*added, "patches/new/__init__.py"]:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("")
    held = code_and_data(build(copy, tmp_path / "wheel", "--wheel"))
    assert set(installed([*added, "patches/new/__init__.py"])) <= set(held)


def test_source_archive_builds_the_same_wheel_and_brings_the_tests(source: Path, wheel: Path, tmp_path: Path) -> None:
    rebuilt = build(source, tmp_path / "both")  # the archive, and the wheel from the unpacked archive
    assert names(rebuilt) == names(wheel)
    with tarfile.open(next((tmp_path / "both").glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    kept_at_home = {".gitignore", ".gitattributes", ".editorconfig"}
    assert set(checkout_files()) - held <= kept_at_home


def test_wheel_is_light_and_describes_itself(described: Message) -> None:
    required = [Requirement(line) for line in described.get_all("Requires-Dist", [])]
    plain = sorted(r.name for r in required if r.marker is None)
    assert plain == ["jinja2", "pillow", "pydantic", "pyyaml", "rich", "torch", "transformers", "typer"]
    assert set(described.get_all("Provides-Extra", [])) == {
        "app",
        "docs",
        "eval",
        "plot",
        "train",
        "tune",
        "test",
        "video",
        "vllm",
        "dev",
    }
    assert described["Version"] == vlmprune.__version__ == __version__
    assert described["Requires-Python"] == ">=3.11"
    assert described["License-Expression"] == "Apache-2.0"
    where = dict(line.split(", ", 1) for line in described.get_all("Project-URL", []))
    assert where.keys() >= {"Homepage", "Documentation", "Changelog", "Issues"}
    assert all(url.startswith("https://github.com/vlmprune/vlmprune") for url in where.values())
    assert described.get_payload().strip() == (ROOT / "README.md").read_text().strip()


def test_wheel_brings_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"vlmprune-{__version__}.dist-info/licenses/LICENSE").decode()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_constraints_pin_what_setup_cfg_asks_for(described: Message) -> None:
    """By exact versions inside the declared ranges, but for `app`, `eval` and `vllm`, which CI does not install."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(name): pin for name, _, pin in (line.partition("==") for line in lines)}
    assert pins["torch"] == "2.13.0"
    for requirement in map(Requirement, described.get_all("Requires-Dist", [])):
        if requirement.name != "vlmprune" and not {"app", "eval", "vllm"} & set(str(requirement.marker).split('"')):
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


@pytest.mark.parametrize("extra", ["eval", "test"])
def test_what_brings_lmms_eval_bounds_what_that_breaks_on(described: Message, extra: str) -> None:
    """lmms-eval 0.7.3 imports `filelock._api`, which filelock 4.3 has no more, and asks for no release of it."""
    asked = [Requirement(line) for line in described.get_all("Requires-Dist", []) if f'extra == "{extra}"' in line]
    (filelock,) = [requirement for requirement in asked if requirement.name == "filelock"]
    assert filelock.specifier.contains("4.2.12")
    assert not filelock.specifier.contains("4.3.1")


def test_every_user_extra_is_in_the_developers_environment() -> None:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    dev = config["options.extras_require"]["dev"]
    assert "vlmprune[docs,plot,test,train,tune,video]" in dev


# Installed, and imported from elsewhere

WHERE = """
    import importlib, importlib.util, pkgutil, sys
    for name in {imported}:
        importlib.import_module(name)
    found = {{name: sys.modules[name].__file__ for name in {imported}}}
    for module in pkgutil.iter_modules(sys.modules["vlmprune"].__path__, "vlmprune."):
        found[module.name] = importlib.util.find_spec(module.name).origin
    for name, file in found.items():
        print(name, file)
    for name in ("eval", "patches", "configs", "scripts", "tests"):
        print(name, importlib.util.find_spec(name))
"""


def where(output: str) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in output.splitlines())


def pip_install(target: Path, *what: str | Path) -> None:
    pip = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index"]
    run(*pip, "--no-deps", "--no-build-isolation", "--target", target, *what, cwd=target.parent)


def python_with(target: Path, code: str) -> str:
    """Run code with target as the only site folder, and the dependencies behind it as a plain folder of packages.

    Plain, so that the editable install this test itself runs on is out of the game.
    """
    libraries = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    libraries |= {path for path in sys.path if path.endswith("site-packages")}
    start = f"import site, sys; site.addsitedir({str(target)!r}); sys.path += {sorted(libraries)}\n"
    return run(sys.executable, "-P", "-S", "-c", start + textwrap.dedent(code), cwd=target.parent)


@pytest.fixture(scope="module")
def from_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("from_wheel") / "site"
    pip_install(target, wheel)
    return target


@pytest.fixture(scope="module")
def editable(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An editable install of a checkout of its own: where it was installed, and the checkout."""
    folder = tmp_path_factory.mktemp("editable")
    ignored = shutil.ignore_patterns("*.egg-info", "build", "*.safetensors", "*.zip")
    shutil.copytree(source, folder / "checkout", ignore=ignored)
    pip_install(folder / "site", "--editable", folder / "checkout")
    return folder / "site", folder / "checkout"


def test_installed_wheel_is_complete_by_itself(from_wheel: Path) -> None:
    found = where(python_with(from_wheel, WHERE.format(imported=IMPORTED)))
    assert [found.pop(name) for name in ("eval", "patches", "configs", "scripts", "tests")] == ["None"] * 5
    assert set(IMPORTED) <= set(found)
    assert {name: file for name, file in found.items() if not file.startswith(f"{from_wheel}/vlmprune/")} == {}


def test_installed_wheel_brings_its_configs(from_wheel: Path, tmp_path: Path) -> None:
    """Found by name from a folder that has none of them."""
    code = f"""
        import os
        os.chdir({str(tmp_path)!r})
        from vlmprune import cli
        from vlmprune.eval.config.schema import load_config
        assert cli.main(["init", "my.yaml"]) == 0
        (setting,) = load_config("my.yaml", ["tasks=suites/common.yaml"]).settings
        print(len(setting.tasks), [entry.label for entry in setting.methods][:2], load_config("demo").path)
    """
    said = python_with(from_wheel, code).splitlines()[-1]
    assert said == f"7 ['fopru', 'todre-stage-1'] {from_wheel}/vlmprune/configs/demo.yaml"


def test_installed_wheel_puts_nothing_else_at_the_top(from_wheel: Path) -> None:
    assert {path.name for path in from_wheel.iterdir()} == {"vlmprune", f"vlmprune-{__version__}.dist-info", "bin"}
    assert [path.name for path in (from_wheel / "bin").iterdir()] == ["vlmprune"]


def test_editable_install_reads_the_checkout(editable: tuple[Path, Path]) -> None:
    site, checkout = editable
    found = where(python_with(site, WHERE.format(imported=IMPORTED)))
    assert [found.pop(name) for name in ("eval", "patches", "configs", "scripts", "tests")] == ["None"] * 5
    assert found["vlmprune"] == f"{checkout}/vlmprune/__init__.py"
    assert found["vlmprune.patches"] == f"{checkout}/patches/__init__.py"
    assert found["vlmprune.configs"] == f"{checkout}/configs/__init__.py"
    assert found["vlmprune.eval"] == f"{checkout}/eval/__init__.py"
    assert found["vlmprune.eval.testbed"] == f"{checkout}/eval/testbed/__init__.py"


def test_editable_install_sees_a_new_sub_package_at_once(editable: tuple[Path, Path]) -> None:
    site, checkout = editable
    (checkout / "eval" / "just_written").mkdir()
    (checkout / "eval" / "just_written" / "__init__.py").write_text("here = 1\n")
    assert python_with(site, "import vlmprune.eval.just_written as new; print(new.here)") == "1\n"


def test_the_command_answers(from_wheel: Path) -> None:
    """`vlmprune` as the installed script runs it, and `python -m vlmprune`."""
    script = python_with(from_wheel, SCRIPT.format(script=str(from_wheel / "bin" / "vlmprune")))
    module = python_with(
        from_wheel,
        "import runpy; sys.argv[1:] = ['--help']; runpy.run_module('vlmprune', run_name='__main__', alter_sys=True)",
    )
    assert "usage: vlmprune" in script
    assert script == module


SCRIPT = """
    import runpy
    sys.argv = ["vlmprune", "--help"]
    runpy.run_path({script!r}, run_name="__main__")
"""


def test_the_command_is_on_the_path_of_this_environment(tmp_path: Path) -> None:
    command = Path(sysconfig.get_path("scripts")) / "vlmprune"
    assert "usage: vlmprune" in run(command, "--help", cwd=tmp_path)
