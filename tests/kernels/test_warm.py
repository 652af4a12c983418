"""What `patch` loads. A CPU needs nothing; a fake GPU counts what would run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from importlib import util
from pathlib import Path

import pytest
import tiny
import torch

import vlmprune
from vlmprune.kernels import choice, warm


@pytest.fixture
def ran(monkeypatch):
    """Ops that run for a device that says it is a GPU."""
    ran = Counter()
    monkeypatch.setattr(warm, "warmed", set())
    monkeypatch.setattr(choice, "run", lambda op, *args: ran.update([op]))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: self)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return ran


def test_all_ops_once_a_device(ran, monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    warm.warm_up([gpu], torch.bfloat16)
    assert not ran
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    warm.warm_up([gpu, torch.device("cpu")], torch.bfloat16)
    assert set(ran) == set(vlmprune.kernels.OPS)
    before = Counter(ran)
    warm.warm_up([gpu], torch.bfloat16)
    assert ran == before


def test_patch_warms_up_unless_told_not_to(monkeypatch):
    seen = []
    monkeypatch.setattr(vlmprune.kernels, "warm_up", lambda devices, dtype: seen.append((devices, dtype)))
    model = tiny.model()
    with vlmprune.patch(model, "fopru", keep=5):
        assert seen == [({torch.device("cpu")}, torch.float32)]
    with vlmprune.patch(model, "fopru", keep=5, warmup=False):
        assert len(seen) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.exhaustive)])
def test_what_models_call_is_loaded(dtype):
    """A form of a kernel that is not would be compiled in the first prefill, and refused where a graph is captured."""
    if util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "loaded_triton.py"
    done = subprocess.run([sys.executable, "-P", script, dtype], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "missing" not in done.stdout, done.stdout[:2000]
    assert int(done.stdout.split()[-1]) > 40
