"""README: what it prints runs as printed, and what it points to is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
URL = "https://github.com/vlmprune/vlmprune/"


def test_the_first_block_runs_offline_as_printed(tmp_path):
    code = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1]
    ran = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    answer, counts = ran.stdout.splitlines()
    said, expected = answer.split(" expected: ")
    assert said == expected
    assert "'patches_before': 256, 'patches_after': 25" in counts


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)]*)\)", TEXT))))
def test_links_are_absolute_and_their_files_exist(link):
    assert link.startswith(URL), "the page on the package index knows no files beside README"
    path = re.fullmatch(r"(?:blob|raw)/main/(.+)", link.removeprefix(URL))[1]
    assert (ROOT / path).is_file()


def test_it_stays_short():
    assert len(TEXT.split()) < 1200
