"""Triton's kernels down to machine code: what the interpreter takes is not always what the compiler takes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

SPILL = 160  # bytes a thread, some more or less by the version of ptxas; a kernel that is too large spills thousands


def spills(tmp_path, ptxas, *arguments):
    """Bytes that every kernel spills, by its line."""
    if util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    script = Path(__file__).parent / "compile_triton.py"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-P", script, ptxas, *arguments], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {line: int(n) for line, n in re.findall(r"^(spills (\d+) .*)$", done.stdout, re.MULTILINE)}


@pytest.mark.parametrize("archs", ["80,120", pytest.param("86,89,90,100", marks=pytest.mark.exhaustive)])
def test_the_largest_do_not_spill(tmp_path, ptxas, archs):
    """Attention in float32 at 128 numbers per head, with all masks; choosing and picking from 4096."""
    found = spills(tmp_path, ptxas, archs, "fp32", "--few")
    assert len(found) == 4 * len(archs.split(","))
    assert max(found.values()) <= SPILL, found


@pytest.mark.exhaustive
def test_all_that_is_launched(tmp_path, ptxas):
    found = spills(tmp_path, ptxas, "80", "fp32", "bf16")  # float16 is as bfloat16
    assert len(found) == 2 * (12 + 5) + 3 * 4 + 2
    assert max(found.values()) <= SPILL, max(found.items(), key=lambda one: one[1])
