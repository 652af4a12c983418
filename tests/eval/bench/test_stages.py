"""Stages add up, and each piece of work is booked where it belongs."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from clocks import FakeClock

import vlmprune
from vlmprune.eval.bench.clock import Clock
from vlmprune.eval.bench.oracle import PlainRun, stretches
from vlmprune.eval.bench.stages import STAGES, stage_seconds
from vlmprune.parts import Transition, taps

NAP = 1000.0  # seconds of a clock that only stamps (a tick each) and naps move


def stages(work, method=None, time=None, **options):
    clock = Clock("cpu", time or FakeClock(tick=1))
    if method is None:
        with torch.no_grad():
            return stage_seconds(work, clock)
    handle = vlmprune.patch(work.model, method, **options)
    with torch.no_grad():
        PlainRun(work).prefill()
        return stage_seconds(work, clock, handle._plan, stretches(handle.trace, work))


def whole(value):
    return sum(value) if isinstance(value, list) else value


def booked(took):
    """The stage that took the nap, or naps."""
    (name,) = [name for name in STAGES if whole(took[name]) >= NAP]
    return name


@pytest.mark.parametrize(("method", "options"), [(None, {}), ("fopru", {"keep": 5}), ("transprune", {})])
def test_they_add_up_to_the_total(work, method, options):
    took = stages(work(2, family="llava_next"), method, **options)
    assert set(took) == {*STAGES, "total"}
    assert sum(whole(took[name]) for name in STAGES) == pytest.approx(took["total"])
    assert all(whole(took[name]) >= 0 for name in STAGES)


def test_the_unpruned_model_pays_nothing_for_pruning(work):
    took = stages(work())
    assert took["taps"] == took["selection"] == took["gather"] == 0
    assert len(took["prefill"]) == 1
    assert min(took["tower"], took["projector"], took["prefill"][0], took["rest"]) > 0


def test_a_method_that_looks_at_nothing_has_no_taps(work):
    took = stages(work(), "random", keep=5)
    assert took["taps"] == 0
    assert min(took["selection"], took["gather"]) > 0


def test_prefill_is_divided_at_the_cuts(work):
    assert len(stages(work(), "fastv", keep=5)["prefill"]) == 2
    assert len(stages(work(), "transprune")["prefill"]) == 4


@pytest.mark.parametrize(
    ("tap", "method", "options"),
    [
        (taps.VisionAttention, "fopru", {"keep": 5}),
        (taps.TextAttention, "fastv", {"keep": 5}),
        (Transition, "transprune", {"prune_layers": (16,), "accumulate_layers": (16,), "keep_ratios": (0.5,)}),
    ],
)
def test_measuring_is_booked_as_taps(work, monkeypatch, tap, method, options):
    here = work()
    time = FakeClock(tick=1)
    monkeypatch.setattr(tap, "measure", time.slow(tap.measure, NAP))
    assert booked(stages(here, method, time, **options)) == "taps"


@pytest.mark.parametrize("name", ["vlmprune.methods.fopru.FoPru.reduce", "vlmprune.methods.fastv.FastV.reduce"])
def test_deciding_is_booked_as_selection(work, monkeypatch, name):
    here = work()
    path, cls, _ = name.rsplit(".", 2)
    owner = getattr(__import__(path, fromlist=[cls]), cls)
    time = FakeClock(tick=1)
    monkeypatch.setattr(owner, "reduce", time.slow(owner.reduce, NAP))
    assert booked(stages(here, path.rsplit(".", 1)[1], time, keep=5)) == "selection"


@pytest.mark.parametrize(
    "name",
    [
        "engine.sequence.Sequence.shorten",
        "engine.sequence.Sequence.expand",
        "engine.prefill.prompt_layout",
        "parts.layout.Layout.from_tower",
    ],
)
def test_shortening_and_bookkeeping_are_booked_as_gather(work, monkeypatch, name):
    here = work()
    room, file, *owners, last = name.split(".")
    owner = import_module(f"vlmprune.{room}.{file}")
    for part in owners:
        owner = getattr(owner, part)
    time = FakeClock(tick=1)
    monkeypatch.setattr(owner, last, time.slow(getattr(owner, last), NAP))
    assert booked(stages(here, "fopru", time, keep=5)) == "gather"


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        ("model.vision_tower", "tower"),
        ("model.multi_modal_projector", "projector"),
        ("model.language_model.layers.1.mlp", "prefill"),
        ("lm_head", "rest"),
    ],
)
@pytest.mark.parametrize("method", [None, "fopru"])
def test_the_models_own_work_is_booked_where_it_is_done(work, path, stage, method):
    here = work()
    time = FakeClock(tick=1)
    handle = here.model.get_submodule(path).register_forward_pre_hook(lambda *_: time.sleep(NAP))
    try:
        assert booked(stages(here, method, time, **({"keep": 5} if method else {}))) == stage
    finally:
        handle.remove()


def test_stamps_change_nothing_and_go_away(work):
    here = work(family="llava_next")
    with torch.no_grad():
        PlainRun(here).prefill()  # transformers puts hooks of its own on with the first call
    count = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in here.model.modules())
    handle = vlmprune.patch(here.model, "todre", keep=5)
    with torch.no_grad():
        PlainRun(here).prefill()
        kept = handle.trace.kept()
        stage_seconds(here, Clock("cpu"), handle._plan, stretches(handle.trace, here))
    assert handle.trace.kept() == kept
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in here.model.modules()) <= count
    assert "get_image_features" not in here.model.model.__dict__
