"""The self-test on models whose positions lie on three axes, and on engines that get them wrong."""

from __future__ import annotations

from functools import cache

import pytest
import tiny
import tiny_qwen
import torch
from checked import passes
from scenes import FALLBACK, OPTIONS, REFUSED, REPEATS, STILL

from vlmprune.engine import decode
from vlmprune.engine.injected import Injected
from vlmprune.patches.qwen2_5_vl import Qwen2_5VL
from vlmprune.patches.qwen2_vl import Qwen2VL
from vlmprune.verify import Subject

FAMILIES = list(tiny_qwen.CLASSES)


@cache
def subject(family, dtype=torch.float32):
    return Subject(tiny.shared(family=family, dtype=dtype))


def options(family, name):
    given = OPTIONS[name](subject(family).model) if name in OPTIONS else {"keep": 0.4}
    return given | FALLBACK.get(name, {})


def cells():
    """Every method on every family; one family a method in every run."""
    for number, name in enumerate((*STILL, *REPEATS)):
        for place, family in enumerate(FAMILIES):
            if (name, family) not in REFUSED:
                often = place == number % len(FAMILIES)
                yield pytest.param(family, name, marks=[] if often else [pytest.mark.exhaustive])


@pytest.mark.parametrize(("family", "name"), list(cells()))
def test_a_sound_engine_passes(family, name, support):
    support("vlmprune check", family, name)
    passes(subject(family).check(name, **options(family, name)))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_half_precision_passes(family):
    passes(subject(family, torch.bfloat16).check("fopru", keep=0.4))


def failed(family, name="fopru", **given):
    return subject(family).check(name, **({"keep": 0.4} | given)).failed


def test_decoding_that_counts_on_by_columns(monkeypatch):
    monkeypatch.setattr(decode, "behind_pictures", decode.unpruned_positions)
    assert "decode" in failed("qwen2_vl")


def test_tokens_of_windows_that_do_not_come_home(monkeypatch):
    def astray(self, tower, values, sizes, unit):
        from transformers.vision_utils import get_vision_window_index

        order, _ = get_vision_window_index(
            torch.tensor(sizes), tower.spatial_merge_size, tower.window_size, tower.patch_size
        )
        return Qwen2VL.tokens_of(self, tower, values, sizes, unit)[:, order]  # and not its inverse

    monkeypatch.setattr(Qwen2_5VL, "tokens_of", astray)
    assert failed("qwen2_5_vl") == ["taps"]
    monkeypatch.setattr(Qwen2_5VL, "tokens_of", Qwen2VL.tokens_of)
    assert failed("qwen2_5_vl") == ["taps"]


def test_features_that_are_not_added_behind_layers(monkeypatch):
    monkeypatch.setattr(Injected, "before", lambda self, index, hidden, columns: hidden)
    assert "rows" in failed("qwen3_vl")
    assert "rows" in failed("qwen3_vl", "fastv")


def test_features_that_are_not_merged_as_hidden_states_are(monkeypatch):
    monkeypatch.setattr(Injected, "merged", lambda self, index, columns, merge: self)
    assert "rows" in failed("qwen3_vl", "pool")
    assert failed("qwen3_vl", "fopru") == []


def test_norms_of_queries_and_keys_that_are_left_out(monkeypatch):
    from vlmprune.patches.language_models import NormedRotaryLayer, RotaryLayer

    monkeypatch.setattr(NormedRotaryLayer, "queries", RotaryLayer.queries)
    assert "taps" in failed("qwen3_vl", "fastv")
