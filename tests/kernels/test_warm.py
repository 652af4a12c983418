"""What `patch` loads. A CPU needs nothing; a fake GPU counts what would run."""

from __future__ import annotations

from collections import Counter

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
