"""The command as a process: instant help, clean streams, exit codes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from clocks import PATIENCE

import vlmprune
from vlmprune._version import __version__

ROOT = Path(vlmprune.__file__).parent


def start(*argv, code=None, env=None):
    command = [sys.executable, "-P", *(["-c", code] if code else ["-m", "vlmprune"]), *map(str, argv)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | (env or {})
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=PATIENCE)


def test_help_imports_nothing_heavy():
    # a stand-in for the package, whose __init__ may import what it likes
    code = f"""
import sys, types
package = types.ModuleType("vlmprune"); package.__path__ = [{str(ROOT)!r}]; sys.modules["vlmprune"] = package
from vlmprune.cli import main
for argv in (["--help"], ["--version"], ["run", "--help"], ["ls", "--help"], ["demo", "--help"], ["run"]):
    print("exit", main(argv))
print("heavy", sorted({{"torch", "transformers", "numpy", "PIL"}} & set(sys.modules)))
"""
    done = start(code=code)
    assert done.stdout.count("exit 0") == 5, done.stderr
    assert done.stdout.count("exit 2") == 1
    assert "heavy []" in done.stdout
    assert f"vlmprune {__version__} (torch " in done.stdout
    assert "examples:" in done.stdout


def test_the_list_of_methods_imports_no_models_and_no_compiler():
    # the families are asked what can be served, which imports nothing of the host's
    heavy = "{'transformers', 'torch._dynamo', 'torchvision', 'vllm'} & set(sys.modules)"
    done = start(code=f"import sys\nfrom vlmprune.cli import main\nprint(main(['ls', 'methods', '--json']), {heavy})")
    assert done.stdout.endswith("]\n0 set()\n"), done.stderr


def test_importing_the_package_imports_none_of_its_rooms():
    code = "import sys, vlmprune\nprint(sorted(name for name in sys.modules if name.startswith('vlmprune.')))"
    assert start(code=code).stdout.strip() == "['vlmprune._compat', 'vlmprune._version']"


def test_the_shell_is_told_what_could_come_next():
    env = {"_VLMPRUNE_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
    assert start(env=env | {"COMP_WORDS": "vlmprune be"}).stdout.split() == ["bench"]
    flags = start(env=env | {"COMP_WORDS": "vlmprune bench --kernels tr", "COMP_CWORD": "3"}).stdout.split()
    assert flags == ["triton"]


@pytest.mark.parametrize(("colour", "marked"), [("", True), ("1", False)])
def test_help_has_no_colour_where_none_is_wanted(colour, marked):
    done = start("ls", "--help", env={"NO_COLOR": colour, "FORCE_COLOR": "1", "TERM": "xterm-256color"})
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]m", done.stdout)) == marked
    assert "vlmprune ls methods fopru      one method with all its options\n" in done.stdout  # as it is to be copied


def test_streams(folders, picture):
    done = start(
        "run", "--image", picture, "--prompt", "what is it ?", "--model", folders["llava"], "--method", "fastv",
        "--keep", "4", "--repeats", "1", "--max-new-tokens", "3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "16 -> 4" in done.stdout
    assert done.stderr == f"loading {folders['llava']} ...\n"  # no warning, no progress bar
    assert "\r" not in done.stdout


def test_a_mistake(tmp_path):
    done = start("run", "--image", tmp_path / "none.png", "--prompt", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"vlmprune: no such picture: {tmp_path / 'none.png'}\n"


def test_reader_that_stops():
    # more than a pipe holds, so that the writer meets the closed end
    code = """
import sys
from vlmprune.cli import main, ls
ls.methods_text = lambda *_, **__: "x" * 500_000
sys.exit(main(["ls", "methods"]))
"""
    command = [sys.executable, "-P", "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 0


def test_of_a_refused_value_one_reads_what_is_allowed_alone(cli):
    code, _, err = cli("ls", "nothing")
    assert code == 2
    assert err.splitlines()[-1] == "vlmprune: Invalid value for 'what': 'nothing' is not one of 'methods', 'models'."
