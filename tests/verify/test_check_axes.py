"""`vlmprune.check` where pictures have any size and positions three axes: it passes, and says what is broken."""

from __future__ import annotations

import pytest
import torch
from checked import FAMILIES, passes, subject
from transformers.vision_utils import get_vision_window_index

from vlmprune.engine import prefill
from vlmprune.engine.injected import Injected
from vlmprune.engine.tower import TowerFrame

KINDS = [kind for kind in FAMILIES if kind.startswith("qwen")]
METHODS = {"fopru": {}, "todre": {"pivot": "mean", "tau": None}, "transprune": {}, "pool": {}, "fastv": {}}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_family_passes(support, kind, name):
    support("vlmprune check", subject(kind).model, name)
    passes(subject(kind).check(name, keep=0.4, **METHODS[name]))


def failing(kind, name="fopru"):
    return set(subject(kind).check(name, keep=0.4).failed)


def test_decoded_tokens_that_count_on_from_the_columns(monkeypatch):
    """What a cache is without the note where its conversation goes on: its prefill is right all the same."""
    monkeypatch.setattr(
        prefill, "onward", lambda positions, real: torch.full((positions.shape[1], 1), positions.shape[-1])
    )
    assert {"decode", "positions", "generate"} <= failing("qwen2.5-vl")


def test_features_that_are_not_added_behind_a_cut(monkeypatch):
    monkeypatch.setattr(Injected, "before", lambda self, index, hidden, columns: hidden)
    assert {"rows", "cache"} <= failing("qwen3-vl")


def test_taps_in_the_order_of_windows(monkeypatch):
    """The tower reads window by window, and the tap must bring its tokens home."""
    measure = TowerFrame.measure

    def as_read(self, *args):
        return measure(self, *args)[get_vision_window_index(torch.tensor(self.call.sizes), 2, 16, 4)[0]]

    monkeypatch.setattr(TowerFrame, "measure", as_read)
    assert failing("qwen2.5-vl") == {"taps"}
