"""The handle, the trace and the budget as a user passes it."""

from __future__ import annotations

import math

import numpy as np
import probes
import pytest
import reference
import tiny
import torch
from leftovers import ours
from reference import Rule
from tiny import CACHE

import vlmprune

METHODS = ["fopru", "vtc_cls", "fastv", "random", "grid", "pool"]


def prompt_of(model, sizes=((40, 24), (20, 70))):
    return tiny.prompt(model, [4, *["image"] * len(sizes), 6], list(sizes))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "keep", [0, -1, -0.5, 0.0, math.nan, math.inf, 1.5, 64.0, "64", True, False, [4], np.float64(1.5)]
)
def test_budgets_that_are_refused(method, keep):
    model = tiny.shared()
    with pytest.raises((TypeError, ValueError), match="keep"):
        vlmprune.patch(model, method, keep=keep)
    assert not ours(model)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [np.int64(4), np.float32(0.25), np.uint8(4), np.float64(0.25)])
def test_numbers_of_numpy(tiny_model, method, keep):
    model = tiny_model()
    with vlmprune.patch(model, method, keep=keep) as handle, torch.no_grad():
        model(**prompt_of(model, [(24, 24)]))
    assert handle.trace.counts[0]["patches_after"] == 4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("keep", [1, 8, 0.25, 0.02])
def test_counts_are_what_the_budget_says(tiny_model, method, family, keep):
    model = tiny_model(family=family)
    options = {"newlines": "all"} if method == "fastv" else {}
    with vlmprune.patch(model, method, keep=keep, **options) as handle, torch.no_grad():
        model(**prompt_of(model))
    for i, (grid, counts) in enumerate(zip(handle.trace.grids, handle.trace.counts, strict=True)):
        assert counts["patches_before"] == grid.patches
        assert counts["newlines_before"] == counts["newlines_after"] == grid.newlines
        assert counts["patches_after"] == len(handle.trace.kept_patches(i))
        if method in ("grid", "pool"):
            budget = keep if isinstance(keep, int) else max(2, keep * grid.patches)
            assert 1 <= counts["patches_after"] <= budget
        elif isinstance(keep, int):
            assert counts["patches_after"] == keep
        else:
            views = grid.patches_per_view if method in ("fopru", "vtc_cls") else [grid.patches]
            assert counts["patches_after"] == sum(max(1, int(keep * v)) for v in views)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_the_trace_tells_what_happened(tiny_model, family):
    model, rules = tiny_model(family=family), [Rule(0, 2), Rule(2, 5, 3, positions="original"), Rule(2, 3, 2)]
    prompt = prompt_of(model)
    handle = vlmprune.patch(model, probes.rules(*rules))
    with pytest.raises(RuntimeError, match="nothing was pruned since"):
        handle.trace.counts  # noqa: B018
    with torch.no_grad():
        out = model(**prompt, use_cache=True)
        trace = handle.trace
        handle.unpatch()
        result = reference.run(model, prompt, rules)
    length = prompt["input_ids"].shape[1]
    assert (trace.prompt_length, trace.prompt_lengths, trace.sample) == (length, [length], [0, 0])
    assert [(c.layer, c.positions, c.merged) for c in trace.cuts] == [
        (0, "contiguous", False),
        (2, "original", False),
        (2, "contiguous", False),
    ]
    for cut, kept in enumerate(result.kept):
        assert [trace.kept(i, cut) for i in range(2)] == kept
    assert trace.kv_lengths == result.kv_lengths == [layer.keys.shape[2] for layer in out[CACHE].layers]
    for i, grid in enumerate(trace.grids):
        n = [len(k[i]) for k in result.kept]
        alive = [n[0], n[0], n[2], n[2]]
        assert trace.entering(i) == alive[0]
        assert trace.layer_average(i) == sum(alive) / 4
        assert trace.counts[i]["patches_after"] + trace.counts[i]["newlines_after"] == n[2]
        assert trace.kept_patches(i) == [t for t in result.kept[2][i] if not grid.newline[t]]
    # the next prefill makes a trace of its own and leaves this one alone
    with vlmprune.patch(model, "random", keep=1) as other, torch.no_grad():
        model(**prompt)
        first = other.trace
        model(**prompt_of(model, [(24, 24)]))
        assert other.trace is not first
        assert len(first.grids) == 2


def test_layer_average_of_a_late_cut(tiny_model):
    model = tiny_model()
    with vlmprune.patch(model, "fastv", keep=4, layer=3) as handle, torch.no_grad():
        model(**prompt_of(model, [(24, 24)]))
    assert (handle.trace.entering(), handle.trace.layer_average()) == (16, (16 * 3 + 4) / 4)


def test_several_methods_one_after_the_other(tiny_model):
    model = tiny_model()
    methods = [vlmprune.registry.find("vtc_cls")(keep=8), vlmprune.registry.find("fastv")(keep=3, layer=2)]
    for order in (methods, methods[::-1]):
        with vlmprune.patch(model, order) as handle, torch.no_grad():
            model(**prompt_of(model, [(24, 24)]))
        assert [(c.method, c.layer) for c in handle.trace.cuts] == [("vtc_cls", 0), ("fastv", 2)]
        assert set(handle.trace.kept(0, 1)) < set(handle.trace.kept(0, 0))
        assert [len(handle.trace.kept(0, c)) for c in (0, 1)] == [8, 3]


@pytest.mark.parametrize("first", ["random", "vtc_cls", "fopru", "grid"])
@pytest.mark.parametrize("second", ["random", "vtc_cls", "fopru", "grid", "fastv"])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_any_two_methods_agree_on_counts(tiny_model, family, first, second):
    """A second cut at the same place sees what the first has left; promised counts must hold there too."""
    model = tiny_model(family=family, dtype=torch.float64)
    methods = [vlmprune.registry.find(name)(keep=keep) for name, keep in ((first, 0.6), (second, 0.5))]
    prompt = prompt_of(model)
    with torch.no_grad(), vlmprune.patch(model, methods) as handle:
        out = model(**prompt, use_cache=True)
        kept = [len(handle.trace.kept(i)) for i in range(2)]
    text = int((prompt["input_ids"] != tiny.IMAGE).sum())
    assert handle.trace.kv_lengths[-1] == text + sum(kept)
    assert [layer.keys.shape[2] for layer in out[CACHE].layers] == handle.trace.kv_lengths
    assert min(kept) >= 1


def test_handles_show_themselves(tiny_model):
    model = tiny_model()
    handle = vlmprune.patch(model, "fopru", keep=4)
    assert "FoPru(keep=4" in repr(handle)
    assert handle.model is model
    assert handle.unpatch() is model


def test_public_names():
    for name in vlmprune.__all__:
        assert getattr(vlmprune, name) is not None


def test_dir_shows_what_users_import_and_no_helpers():
    assert set(dir(vlmprune)) == {*vlmprune.__all__, "kernels", "methods", "vllm"}
    for name in dir(vlmprune):
        assert getattr(vlmprune, name) is not None


def test_a_trace_shows_itself_in_a_few_lines(tiny_model):
    model = tiny_model(family="llava_next")
    with torch.no_grad(), vlmprune.patch(model, "vtc_cls", keep=3) as handle:
        model(**prompt_of(model))
        told = repr(handle.trace)
        assert "tensor" not in told
        assert len(told) < 600
        assert "CutTrace(layer=0, method='vtc_cls', positions='contiguous')" in told
        assert f"kv_lengths={handle.trace.kv_lengths}" in told


def test_no_test_finds_what_another_left(tiny_model):
    """Part one: leave a patch on a shared model."""
    vlmprune.patch(tiny_model(), "fastv", keep=5)


def test_no_test_finds_what_another_left_behind(tiny_model):
    """Part two, behind it."""
    assert not [name for name, part in tiny_model().named_modules() if part._forward_pre_hooks]
