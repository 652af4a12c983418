"""The oracle and the stages of families beyond LLaVA: positions on several axes, injected features, pictures that see
all of themselves, tiles."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import tiny
import torch
from kin import KIN
from leftovers import ours
from oracles import compare

import vlmprune
from vlmprune.eval.bench.clock import Clock
from vlmprune.eval.bench.counting import count
from vlmprune.eval.bench.measure import Effort, measure_method, measure_unpruned
from vlmprune.eval.bench.oracle import Oracle, PlainRun, stretches
from vlmprune.eval.bench.stages import STAGES, stage_seconds
from vlmprune.eval.bench.workload import make_workload

QWEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
OTHERS = [name for name in KIN if not name.startswith("video_llava-")]
METHODS = {
    "random": {"keep": 5},
    "fastv": {"keep": 5},
    "transprune": {},
    "todre": {"keep": 6, "tau": 1.0, "pivot": "mean"},
}
EXACT = {"paligemma": 1e-6}  # which has float32 in its norms, and is no nearer to itself in a padded batch


@cache
def work(family, batch=2):
    model = tiny.shared(family=family, dtype=torch.float64) if family in QWEN else KIN[family].model()
    return make_workload(model, batch, 7)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", QWEN)
def test_positions_on_axes_and_features_behind_layers(family, name):
    here = work(family)
    difference, _ = compare(here, vlmprune.patch(here.model, name, **METHODS[name]))
    assert difference < 1e-9


@pytest.mark.parametrize(("number", "family"), [*enumerate(OTHERS)])
def test_every_family(number, family):
    here = work(family)
    able = [name for name in METHODS if not KIN[family].refusal(name)]
    name = able[number % len(able)]
    difference, _ = compare(here, vlmprune.patch(here.model, name, **METHODS[name]))
    assert difference < EXACT.get(family, 1e-9)


def pruned(here, name="random", **options):
    """What a pruned model leaves behind a picture: its logits, those of a decoded token, and the trace."""
    handle, run = vlmprune.patch(here.model, name, **({"keep": 5} | options)), PlainRun(here)
    with torch.no_grad():
        token = run.prefill()
        first = run.logits
        run.step(token, run.place(0))
    handle.unpatch()
    return token, first, run.logits, handle.trace


@pytest.mark.parametrize("family", QWEN)
def test_other_positions_give_other_logits(family):
    here = work(family)
    token, first, then, trace = pruned(here)
    count = torch.arange(here.length).expand(here.places.shape)
    with torch.no_grad():
        oracle = Oracle(replace(here, places=count), trace)
        oracle.prefill()
        assert (oracle.logits - first).abs().max() > 1e-4
        oracle = Oracle(replace(here, end=here.length), trace)
        oracle.prefill()
        torch.testing.assert_close(oracle.logits, first, rtol=1e-9, atol=1e-9)
        oracle.step(token, oracle.place(0))
    assert (oracle.logits - then).abs().max() > 1e-6


@pytest.mark.parametrize("name", ["random", "fastv"])
def test_features_that_are_left_out_give_other_logits(monkeypatch, name):
    here = work("qwen3_vl")
    _, first, _, trace = pruned(here, name)
    encode = type(here.model.model).get_image_features

    def bare(self, *args, **kwargs):
        out = encode(self, *args, **kwargs)
        out.deepstack_features = []
        return out

    monkeypatch.setattr(type(here.model.model), "get_image_features", bare)
    with torch.no_grad():
        oracle = Oracle(here, trace)
        oracle.prefill()
    assert (oracle.logits - first).abs().max() > 1e-4


def test_pictures_that_do_not_see_themselves_give_other_logits():
    here = work("gemma3")
    _, first, _, trace = pruned(here)
    with torch.no_grad():
        oracle = Oracle(here, trace)
        oracle.blocks = None
        oracle.prefill()
    assert (oracle.logits - first).abs().max() > 1e-5


def test_tiles_are_one_picture_or_pictures_of_their_own():
    here = work("internvl")
    assert (here.views, here.visual, here.patches) == (5, 45, 45)
    handle = vlmprune.patch(here.model, "random", keep=5)
    with torch.no_grad():
        PlainRun(here).prefill()
    handle.unpatch()
    assert stretches(handle.trace, here)[0].index.shape == (2, 5 + 7)
    here = work("smolvlm")
    assert (here.views, here.visual) == (5, 45)
    handle = vlmprune.patch(here.model, "random", keep=5)
    with torch.no_grad():
        PlainRun(here).prefill()
    handle.unpatch()
    assert stretches(handle.trace, here)[0].index.shape == (2, 5 * 5 + 7)


@pytest.mark.parametrize("family", [*QWEN, "internvl", "smolvlm", "ovis2", "deepseek_vl"])
def test_stages_add_up_and_a_merger_inside_the_tower_is_no_part_of_it(family):
    here = work(family, 1)
    with torch.no_grad():
        took = stage_seconds(here, Clock("cpu"))
    assert set(took) == {*STAGES, "total"}
    whole = sum(sum(took[name]) if isinstance(took[name], list) else took[name] for name in STAGES)
    assert whole == pytest.approx(took["total"])
    assert min(took["tower"], took["projector"], took["prefill"][0]) > 0
    assert not ours(here.model)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl"])
def test_a_cell(family):
    here, effort = work(family, 1), Effort(pairs=2, plain=1, stages=1, new_tokens=4)
    base = measure_unpruned(here, effort)
    found = measure_method(here, vlmprune.patch(here.model, "fastv", keep=5), base, effort)
    assert found["same_as_oracle"] < 1e-9
    assert found["flops"]["formula"] is base["flops"]["formula"] is None
    assert found["flops"]["counted"] < base["flops"]["counted"]
    assert [part["columns"] for part in found["stretches"]] == [here.length, 12]
    assert found["decode_ms"]["oracle"]["runs"] == 2
    assert count(here, PlainRun(here).prefill)["tower_tokens"][0][0] > 0
