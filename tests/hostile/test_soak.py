"""Many generations in one process: no memory, tensor or hook is left behind (`scripts/soak.py` runs 2,000)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

import vlmprune

GENERATIONS = 126  # six rounds of 21, three of them to warm up


@pytest.fixture
def script(monkeypatch):
    """`scripts/soak.py` as a module."""
    spec = importlib.util.spec_from_file_location("soak", Path(__file__).parents[2] / "scripts" / "soak.py")
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "soak", made)  # its dataclasses look there
    spec.loader.exec_module(made)
    return made


def test_nothing_piles_up(script):
    assert script.soak(GENERATIONS) == []


def test_a_leak_is_noticed(script, monkeypatch):
    """A trace kept for each generation, or one small tensor, is enough."""
    kept, patch = [], vlmprune.patch
    monkeypatch.setattr(script, "FAMILIES", {"llava": {}})
    monkeypatch.setattr(script, "METHODS", {"random": {"keep": 5}})

    def leak(model, *args, **options):
        handle = patch(model, *args, **options)
        kept.append(handle)
        return handle

    assert script.soak(8) == []
    monkeypatch.setattr(vlmprune, "patch", leak)
    wrong = script.soak(8)
    assert any("tensors more than" in line for line in wrong)
    assert any("objects more than" in line for line in wrong)


def test_a_hook_that_stays_is_noticed(script, monkeypatch):
    monkeypatch.setattr(script, "FAMILIES", {"llava": {}})
    monkeypatch.setattr(script, "METHODS", {"random": {"keep": 5}})
    monkeypatch.setattr(vlmprune, "unpatch", lambda model: model)
    assert any("hooks or attributes are left" in line for line in script.soak(2))
