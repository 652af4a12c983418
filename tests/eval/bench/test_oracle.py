"""The oracle computes what the pruned model computes, with none of its parts."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from leftovers import ours
from oracles import compare

import vlmprune
from vlmprune.eval.bench.oracle import Oracle, PlainRun, stretches
from vlmprune.methods.base import Method
from vlmprune.parts.cuts import Cut, Decoder, Reduction

METHODS = {
    "fopru": ("fopru", {"keep": 5}),
    "original positions": ("random", {"keep": 5, "positions": "original"}),
    "all": ("random", {"keep": 1.0}),
    "rows": ("fopru", {"keep": 0.3, "newlines": "none"}),
    "fastv": ("fastv", {"keep": 5}),
    "fastv contiguous": ("fastv", {"keep": 5, "positions": "contiguous"}),
    "transprune": ("transprune", {}),
    "todre, text alone late": ("todre", {"keep": 6, "tau": 1.0}),
}


@dataclass(frozen=True)
class Ragged(Method):
    """Row r keeps its first 3 + 4 r tokens at `layer`: rows of a batch end up unequally long."""

    layer: int = 0
    name = "ragged"

    def cuts(self, facts):
        return [Cut(Decoder(self.layer), (), self.reduce, "contiguous")]

    def reduce(self, seen, layout):
        number = torch.arange(layout.width)
        return Reduction(layout.alive & (number < 3 + 4 * torch.tensor(layout.sample)[:, None]))


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("which", METHODS)
def test_it_computes_what_the_pruned_model_computes(work, which, family):
    method, options = METHODS[which]
    here = work(2, family=family, dtype=torch.float64)
    difference, _ = compare(here, vlmprune.patch(here.model, method, **options))
    assert difference < 1e-9


@pytest.mark.parametrize("which", ["fopru", "fastv"])
def test_full_and_sliding_layers_in_one_model(work, which):
    method, options = METHODS[which]
    here = work(2, dtype=torch.float64, text="qwen2", use_sliding_window=True, max_window_layers=1, sliding_window=6)
    difference, _ = compare(here, vlmprune.patch(here.model, method, **options))
    assert difference < 1e-9


@pytest.mark.parametrize("layer", [0, 2])
def test_rows_of_different_lengths(work, layer):
    here = work(2, dtype=torch.float64)
    difference, oracle = compare(here, vlmprune.patch(here.model, Ragged(layer)))
    assert difference < 1e-9
    last = oracle.stretches[-1]
    assert last.first == layer
    assert last.mask.sum(1).tolist() == [7 + 3, 7 + 7]


def test_other_rows_give_other_logits(work):
    here = work(dtype=torch.float64)
    handle = vlmprune.patch(here.model, "random", keep=5)
    with torch.no_grad():
        pruned = PlainRun(here)
        pruned.prefill()
        keep = handle.trace.cuts[0].keep
        keep.copy_(keep.roll(1, dims=1))
        handle.unpatch()
        oracle = Oracle(here, handle.trace)
        oracle.prefill()
    assert (pruned.logits - oracle.logits).abs().max() > 1e-3


def test_the_layers_below_a_deep_cut_see_everything(work):
    here = work()
    handle = vlmprune.patch(here.model, "fastv", keep=5)
    with torch.no_grad():
        PlainRun(here).prefill()
        handle.unpatch()
        oracle = Oracle(here, handle.trace)
        oracle.prefill()
    assert [(s.first, s.index.shape[1]) for s in oracle.stretches] == [(0, 23), (2, 12)]
    assert [layer.keys.shape[2] for layer in oracle.cache.layers] == [23, 23, 12, 12]


def test_it_runs_no_hook_and_no_score(work, monkeypatch):
    here = work()
    handle = vlmprune.patch(here.model, "fopru", keep=5)
    with torch.no_grad():
        PlainRun(here).prefill()
    handle.unpatch()
    assert not ours(here.model)
    monkeypatch.setattr("vlmprune.engine.prefill.Prefill.__init__", lambda *_: pytest.fail("the engine ran"))
    monkeypatch.setattr("vlmprune.parts.taps.VisionAttention.measure", lambda *_: pytest.fail("a tap was measured"))
    with torch.no_grad():
        Oracle(here, handle.trace).prefill()


def test_stretches_of_an_uncut_prompt(work):
    here = work()
    handle = vlmprune.patch(here.model, "downsample", keep=0.5)
    with torch.no_grad():
        PlainRun(here).prefill()
    handle.unpatch()
    (whole,) = stretches(handle.trace, here)
    assert whole.index.tolist() == [list(range(23))]
    assert whole.mask is None


def test_decode_positions_move_down_by_what_was_dropped(work):
    here = work()
    handle = vlmprune.patch(here.model, "fastv", keep=5, positions="contiguous")
    with torch.no_grad():
        PlainRun(here).prefill()
    handle.unpatch()
    _, positions = Oracle(here, handle.trace).place(3)
    assert [p.tolist() for p in positions] == [[[26]], [[26 - 11]]]


def test_soft_masks_have_no_oracle(work):
    here = work()
    handle = vlmprune.patch(here.model, "random", keep=5)
    with torch.no_grad():
        PlainRun(here).prefill()
    handle.unpatch()
    object.__setattr__(handle.trace.cuts[0], "soft", torch.ones(1, 16))
    with pytest.raises(ValueError, match="no oracle"):
        stretches(handle.trace, here)
