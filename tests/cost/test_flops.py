"""FLOPs by formula, by hand; tests/eval/bench/test_counting.py holds them beside torch's counter."""

from __future__ import annotations

import tiny

from vlmprune.cost.flops import kv_width, language_flops, prefill_flops


def test_language_flops_by_hand():
    config = tiny.model(num_key_value_heads=4).config
    assert kv_width(config) == 32  # as wide as the layer: every head has its own keys
    # d 32, m 48; 5 tokens in one layer
    assert language_flops(config, [5]) == 2 * (5 * 4 * 32 * 32 + 2 * 25 * 32 + 3 * 5 * 32 * 48)


def test_grouped_queries_by_hand():
    config = tiny.shared().config  # 2 of 4 heads have keys of their own
    assert kv_width(config) == 16
    assert language_flops(config, [5]) == 2 * (5 * (2 * 32 * 32 + 2 * 32 * 16) + 2 * 25 * 32 + 3 * 5 * 32 * 48)


def test_grouped_queries_in_the_published_formula():
    assert prefill_flops([7], 8, 12) == prefill_flops([7], 8, 12, kv_hidden=8) == 4 * 7 * 64 + 2 * 49 * 8 + 3 * 7 * 96
    assert prefill_flops([7], 8, 12, kv_hidden=2) == prefill_flops([7], 8, 12) - 2 * 7 * 8 * 6
