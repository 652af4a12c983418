"""Modes of use by chance: padding, caches, turns, pairs of methods, rows; every row against a run of it by hand."""

from __future__ import annotations

import probes
import pytest
import reference
import tiny
import torch
from conversations import caches, talk
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from probes import far, same
from reference import Rule
from scenes import replay_turns

import vlmprune
from vlmprune import registry

F64 = torch.float64
MODELS = {
    "llava": {},
    "next": {"family": "llava_next"},
    "onevision": {"family": "llava_onevision", "tower": "siglip", "text": "qwen2"},
}
LAYERS = st.integers(0, tiny.LAYERS - 1)
POSITIONS = st.sampled_from(["contiguous", "original"])
RULES = st.builds(
    Rule, layer=LAYERS, mod=st.integers(2, 4), rest=st.integers(1, 2), positions=POSITIONS, merge=st.booleans(),
    emergent=st.booleans(),
)  # fmt: skip
PAIRS = st.lists(RULES, min_size=1, max_size=2).map(lambda rules: sorted(rules, key=lambda rule: rule.layer))
#: What turns before the last one are: a prompt with a picture, pruned or plain, and a text
TURNS = st.lists(st.sampled_from(["pruned", "plain", "text"]), min_size=0, max_size=2)
KEEPS = st.sampled_from([3, 5, 0.3, 0.6])
#: Pairs of real methods in the order in which they cut: in front of the language model or in the tower, and inside
FIRST = st.sampled_from(["vtc_cls", "random", "tome", "pool", "grid", "fopru", "downsample"])
SECOND = st.sampled_from([None, "fastv", "transprune"])


def by_chance(examples):
    """The same examples in every run, however slow the machine is."""
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, phases=[Phase.generate, Phase.shrink]
    )


def turn_of(model, kind, seed):
    parts = [5 + seed] if kind == "text" else [3, "image", 4 + seed]
    sizes = [] if kind == "text" else [[(24, 24), (40, 24), (20, 70)][seed % 3]]
    return tiny.prompt(model, parts, sizes, seed=seed)


def judge(model, handle, kinds, padding, kind):
    with torch.no_grad(), handle:
        told = [(k, turn_of(model, k, seed)) for seed, k in enumerate(kinds)]
        turns, got, forced = talk(model, handle, told, padding, caches(model, kind))
        same(got, replay_turns(model, turns, forced=forced))
        return turns, got, forced


@by_chance(30)
@given(
    name=st.sampled_from(sorted(MODELS)), rules=PAIRS, before=TURNS, padding=st.integers(0, 4),
    kind=st.sampled_from(["static", "dynamic"]),
)  # fmt: skip
def test_conversations_of_one_row(name, rules, before, padding, kind):
    model = tiny.shared(dtype=F64, **MODELS[name])
    judge(model, vlmprune.patch(model, probes.rules(*rules)), [*before, "pruned"], padding, kind)


@by_chance(15)
@given(
    name=st.sampled_from(["llava", "next"]), first=FIRST, second=SECOND, keep=KEEPS, before=TURNS,
    padding=st.integers(0, 4), kind=st.sampled_from(["static", "dynamic"]),
)  # fmt: skip
def test_pairs_of_methods(name, first, second, keep, before, padding, kind):
    model = tiny.shared(dtype=F64, **MODELS[name])
    # inside the tower all views are merged alike, and by a half at most in each of few layers
    methods = [registry.find(first)(keep=0.6 if first == "tome" else keep)]
    methods += [registry.find(second)(keep=2)] if second else []
    judge(model, vlmprune.patch(model, methods), [*before, "pruned"], padding, kind)


@pytest.mark.parametrize("method", ["random", "fastv"])
@pytest.mark.parametrize("before", ["text", "plain", "pruned"])
def test_one_padded_row_on_a_static_cache_in_a_later_turn(method, before):
    """Its padding is no part of the conversation; with a trace that is wrong in one token the answer differs."""
    model = tiny.shared(dtype=F64)
    handle = vlmprune.patch(model, method, keep=4)
    turns, got, forced = judge(model, handle, [before, "pruned", "text"], 3, "static")
    with torch.no_grad():
        far(got, replay_turns(model, turns, wrong=True, at=1, forced=forced))


@by_chance(15)
@given(
    name=st.sampled_from(sorted(MODELS)), rules=PAIRS, side=st.sampled_from(["left", "right"]),
    sizes=st.lists(st.sampled_from([(24, 24), (40, 24), (20, 70), None]), min_size=2, max_size=3),
)  # fmt: skip
def test_rows_of_a_batch(name, rules, side, sizes):
    """Every row of a batch, padded on either side, is what it is alone; some have no picture."""
    model = tiny.shared(dtype=F64, **MODELS[name])
    rows = [
        tiny.prompt(model, [3 + i, "image", 5] if size else [4 + i], [size] if size else [], seed=i, together=True)
        for i, size in enumerate(sizes)
    ]
    forced = probes.random_tokens(len(rows), 2)
    with torch.no_grad(), vlmprune.patch(model, probes.rules(*rules)):
        got = probes.forced_logits(model, tiny.batch(rows, side), forced)
    with torch.no_grad():
        for i, row in enumerate(rows):
            mine = rules if sizes[i] else []
            same(got[i], reference.run(model, row, mine, forced[i].tolist()).logits)
