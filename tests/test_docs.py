"""docs/: pages whose code runs as printed, a notebook that is the page, and a site without a broken link."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import write_notebook

from vlmprune.cli import main
from vlmprune.eval import testbed

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    """The code of a page, in order."""
    return [code for found, code in BLOCK.findall((DOCS / page).read_text(encoding="utf-8")) if found == language]


def test_the_first_tutorial_runs_as_printed(tmp_path):
    code = "\n".join(blocks("tutorials/first-patch.md", "python"))
    ran = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    shown = testbed.pictures()[0]
    assert ran.stdout.splitlines()[:2] == [f"{shown['question']} -> {shown['answer']}", f"unpruned: {shown['answer']}"]
    assert f"fopru: {shown['answer']}" in ran.stdout
    assert "'patches_before': 256, 'patches_after': 64" in ran.stdout


def test_the_notebook_is_the_tutorial():
    """After a change of the page: scripts/write_notebook.py."""
    assert (ROOT / "scripts" / "first_patch.ipynb").read_text(encoding="utf-8") == write_notebook.made()


def test_the_tutorial_of_a_method_runs_as_printed(tmp_path):
    code = "\n".join(blocks("tutorials/own-method.md", "python"))
    ran = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "'patches_after': 25" in ran.stdout


def test_own_data_as_printed(tmp_path, monkeypatch):
    """The four files of the page, with three questions about shipped pictures."""
    page = "howto/own-data.md"
    (tmp_path / "pictures").mkdir()
    lines = []
    for i, shown in enumerate(testbed.pictures()[:3]):
        shutil.copy(shown["file"], tmp_path / "pictures" / f"{i}.png")
        lines.append({"image": f"pictures/{i}.png", "question": shown["question"], "answer": shown["answer"]})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "utils.py").write_text(blocks(page, "python")[0])
    for name, text in zip(("my_task.yaml", "my.yaml"), blocks(page, "yaml"), strict=True):
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    assert main(["validate", "my.yaml"]) == 0
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(["eval", "my.yaml", "--set", "methods=[fopru]", "--set", "controls=[none]"]) == 0
    results = (tmp_path / "out" / "report.md").read_text()
    assert "my_task" in results
    assert "100.0" in results  # the unpruned model knows these three


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-P", "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return out


def test_the_site_has_what_is_made_of_the_code(site):
    page = (site / "reference" / "cli" / "index.html").read_text(encoding="utf-8")
    for verb in ("run", "eval", "bench", "fidelity", "serve"):
        assert f"vlmprune {verb}" in page
    assert "--max-new-tokens" in page
    assert "own_budget" in (site / "reference" / "yaml" / "index.html").read_text(encoding="utf-8")
    assert "unpatch" in (site / "reference" / "api" / "index.html").read_text(encoding="utf-8")
