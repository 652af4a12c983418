"""The claims that tests make of what is supported, run in pytest processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from clocks import PATIENCE

TESTS = """
import pytest
from types import SimpleNamespace

MODEL = SimpleNamespace(config=SimpleNamespace(model_type="llava"))


def test_works(support):
    support("beams", MODEL, "fopru")


@pytest.mark.parametrize("number", [1, 2])
def test_works_twice(support, number):
    support("sampling", "next-video", "fopru")


@pytest.mark.parametrize("number", [1, 2])
def test_half_of_it(support, number):
    support("lookup", MODEL, "fopru")
    support("streaming", MODEL, "fopru")
    assert number == 1


def test_refused(support):
    support("attentions", MODEL, "fopru", refused="layers differ")


def test_refused_in_other_words(support):
    support("attentions", MODEL, "fopru", refused="heads differ")


def test_also_without_attentions(support):
    support("attentions", MODEL, "fopru")


def test_refused_and_skipped(support):
    support("video", MODEL, "tome", refused="blended")
    pytest.skip("there is no more to check")


def test_skipped_before_it_was_checked(support):
    support("images", MODEL, "tome")
    pytest.skip("no time")


def test_refused_wrongly(support):
    support("batches", MODEL, "tome", refused="rows differ")
    raise ValueError


@pytest.fixture
def broken_end():
    yield
    raise ValueError


def test_fails_at_its_end(support, broken_end):
    support("cache", MODEL, "tome")


def test_without_claims(support):
    pass


def test_of_something_else():
    assert False
"""
MADE = [
    {"feature": "attentions", "family": "llava", "method": "fopru", "outcome": "refused", "tests": 3,
     "why": "heads differ; layers differ"},
    {"feature": "batches", "family": "llava", "method": "tome", "outcome": "fails", "tests": 1, "why": "rows differ"},
    {"feature": "beams", "family": "llava", "method": "fopru", "outcome": "works", "tests": 1},
    {"feature": "cache", "family": "llava", "method": "tome", "outcome": "fails", "tests": 1},
    {"feature": "lookup", "family": "llava", "method": "fopru", "outcome": "fails", "tests": 2},
    {"feature": "sampling", "family": "next-video", "method": "fopru", "outcome": "works", "tests": 2},
    {"feature": "streaming", "family": "llava", "method": "fopru", "outcome": "fails", "tests": 2},
    {"feature": "video", "family": "llava", "method": "tome", "outcome": "refused", "tests": 1, "why": "blended"},
]  # fmt: skip


def run(folder: Path, *options: str) -> str:
    """Run `TESTS` with the plugin; returns what pytest printed."""
    (folder / "test_claims.py").write_text(TESTS)
    (folder / "conftest.py").write_text('pytest_plugins = ["support"]\n')
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={folder}",
         "-o", f"pythonpath={Path(__file__).parent}", *options, folder],
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr  # some of them fail
    return done.stdout


@pytest.mark.parametrize("processes", [0, 2])
def test_what_comes_of_claims(tmp_path, processes):
    pytest.importorskip("xdist")
    file = tmp_path / "made" / "support.json"
    printed = run(tmp_path, f"--support={file}", f"-n{processes}")
    assert json.loads(file.read_text()) == MADE
    assert "test_of_something_else" in printed


def test_only_tests_with_claims(tmp_path):
    file = tmp_path / "support.json"
    printed = run(tmp_path, f"--support={file}", "--support-only")
    assert json.loads(file.read_text()) == MADE
    assert "test_of_something_else" not in printed
    assert "1 deselected" in printed
