"""FLOPs by counter and by formula, memory, bytes in the cache."""

from __future__ import annotations

import pytest
import torch

import vlmprune
from vlmprune.cost.flops import formula_flops
from vlmprune.eval.bench.counting import AliveBytes, count, kv_bytes
from vlmprune.eval.bench.oracle import PlainRun


def by_formula(work, tokens, counted):
    return work.batch * formula_flops(work.model.config, tokens, counted["tower_tokens"], work.views)


KINDS = [
    {},
    {"family": "llava_next"},
    {"tower": "siglip"},
    {"text": "qwen2", "num_key_value_heads": 1},
    {"num_key_value_heads": 4},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_the_formula_is_what_the_counter_counts(work, kind, batch):
    here = work(batch, **kind)
    with torch.no_grad():
        counted = count(here, PlainRun(here).prefill)
    assert counted["tower_tokens"] == [(16 + (kind.get("tower") != "siglip"),) * 2] * 6
    assert counted["flops"] == by_formula(here, [here.length] * 4, counted)


@pytest.mark.parametrize("method", ["random", "grid"])
def test_the_formula_follows_the_cut(work, method):
    here = work(2)
    with vlmprune.patch(here.model, method, keep=4) as handle, torch.no_grad():
        counted = count(here, PlainRun(here).prefill)
        assert handle.trace.kv_lengths == [11] * 4
        assert counted["flops"] == by_formula(here, handle.trace.kv_lengths, counted)


def test_the_formula_follows_merging_inside_the_tower(work):
    """What the counter sees beyond it are the cosines of ToMe's two halves of the patches, five times."""
    here = work(2)
    with vlmprune.patch(here.model, "tome", keep=0.5) as handle, torch.no_grad():
        counted = count(here, PlainRun(here).prefill)
    assert counted["tower_tokens"] == [(17, 15), (15, 13), (13, 11), (11, 10), (10, 9), (9, 9)]
    formula = by_formula(here, handle.trace.kv_lengths, counted)
    wide = here.model.config.vision_config.hidden_size // here.model.config.vision_config.num_attention_heads
    cosines = sum((n // 2) * ((n + 1) // 2) * wide for n in (16, 14, 12, 10, 9))
    assert counted["flops"] - formula == 2 * here.batch * cosines


def test_counting_leaves_no_hooks(work):
    here = work()
    before = sum(len(module._forward_pre_hooks) for module in here.model.modules())
    with torch.no_grad():
        count(here, PlainRun(here).prefill)
    assert sum(len(module._forward_pre_hooks) for module in here.model.modules()) == before


def test_bytes_in_the_cache(work):
    here = work(2)
    plain = PlainRun(here)
    with torch.no_grad():
        plain.prefill()
        assert kv_bytes(plain.cache) == 4 * 2 * 2 * 23 * 16 * 4  # layers, k and v, rows, columns, width, float32
        with vlmprune.patch(here.model, "fastv", keep=5):
            plain.prefill()
        assert kv_bytes(plain.cache) == (2 * 23 + 2 * 12) * 2 * 2 * 16 * 4


def test_alive_bytes_sees_the_peak_and_forgets_what_is_gone():
    base = torch.ones(1000)
    with AliveBytes() as alive:
        a = base + 1  # 4000
        b = a * 2  # 8000
        view = b[10:].view(-1)  # nothing new
        a.add_(1)  # nothing new
        del a  # 4000
        c = view + 1  # 7960
        del b, view, c
    assert alive.peak == 8000


def test_a_pruned_prefill_needs_less(work):
    here = work(2, family="llava_next")
    with torch.no_grad():
        plain = count(here, PlainRun(here).prefill)
        with vlmprune.patch(here.model, "random", keep=0.1):
            pruned = count(here, PlainRun(here).prefill)
    assert pruned["peak_bytes"] < plain["peak_bytes"]
    assert pruned["flops"] < plain["flops"]
