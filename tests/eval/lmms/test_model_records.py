"""What the model that lmms-eval asks notes of every request: visual tokens, times, memory."""

from __future__ import annotations

import harness
import pytest
from clocks import FakeClock

from vlmprune.eval.lmms.measure import Stopwatch
from vlmprune.eval.lmms.model import VlmPrune

FOPRU = {"method": "fopru", "keep": 5}


@pytest.fixture
def clock(monkeypatch):
    """What requests are timed by."""
    made = FakeClock()
    monkeypatch.setattr(Stopwatch, "now", lambda self: made())
    return made


def test_records_are_of_the_requests_since_the_last_call(folders, docs):
    lm = VlmPrune(folders["llava_next"], method="fastv", keep=8, batch_size=4, device="cpu")
    harness.evaluate(lm, [harness.task(docs["llava_next"], "b"), harness.task(docs["llava_next"], "a")], limit=4)
    records = lm.take_records()
    assert [(r["task"], r["doc"]) for r in records] == [(t, d) for t in "ab" for d in range(4)]
    assert lm.take_records() == []
    blind, one, two = records[0], records[1], records[2]
    assert blind["tokens_before"] == blind["tokens_after"] == blind["layer_average"] == 0
    for record in (one, two):  # cut inside the language model
        assert record["tokens_before"] == record["tokens_after"] > record["layer_average"] > 8
    assert two["tokens_before"] > one["tokens_before"]
    lm.use("none")
    harness.evaluate(lm, [harness.task(docs["llava_next"])], limit=4)
    assert all(r["tokens_before"] == r["tokens_after"] == r["layer_average"] for r in lm.take_records())


def test_the_first_token_is_timed_without_another_forward(folders, docs, clock):
    lm = VlmPrune(folders["llava"], **FOPRU, device="cpu")
    task = harness.task(docs["llava"], generation_kwargs={"max_new_tokens": 4})
    calls = []

    def slow(module, args, kwargs):
        calls.append(kwargs["inputs_embeds"].shape[1] if kwargs.get("inputs_embeds") is not None else 0)
        clock.sleep(0.25 if len(calls) == 1 else 0.5)

    (request,) = [r for r in harness.instances(lm, task) if r.doc_id == 1]
    lm.generate_until([request])
    lm.take_records()
    hook = lm.loaded.model.model.language_model.register_forward_pre_hook(slow, with_kwargs=True)
    lm.generate_until([request])
    hook.remove()
    (record,) = lm.take_records()
    assert len(calls) == record["output_tokens"] == 4
    assert record["ttft_s"] == 0.25
    assert record["decode_tokens_per_s"] == 3 / (3 * 0.5)
    assert record["peak_memory_bytes"] is None or record["peak_memory_bytes"] > 2**20


def test_what_loading_left_to_the_first_request_is_not_measured(folders, docs, clock):
    lm = VlmPrune(folders["llava"], device="cpu")
    task = harness.task(docs["llava"], generation_kwargs={"max_new_tokens": 1})
    calls = []

    def slow(module, args, kwargs):
        calls.append(1)
        clock.sleep(1.0 if len(calls) == 1 else 0.25)

    hook = lm.loaded.model.model.language_model.register_forward_pre_hook(slow, with_kwargs=True)
    requests = harness.instances(lm, task)[:2]
    lm.generate_until(requests)
    records = lm.take_records()
    assert [record["doc"] for record in records] == [request.doc_id for request in requests]
    assert [record["ttft_s"] for record in records] == [0.25, 0.25]
    assert len(calls) == 3
    lm.use(**FOPRU)
    lm.generate_until(requests)
    hook.remove()
    assert len(calls) == 5  # once a load


def test_one_token_has_no_decode_speed(folders, docs):
    lm = VlmPrune(folders["llava"], device="cpu")
    harness.evaluate(lm, [harness.task(docs["llava"], generation_kwargs={"max_new_tokens": 1})], limit=2)
    assert [record["decode_tokens_per_s"] for record in lm.take_records()] == [None, None]
