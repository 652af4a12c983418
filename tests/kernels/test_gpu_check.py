"""What scripts/gpu_check.py must not take for a success."""

from __future__ import annotations

import gpu_check
import gpu_table
import pytest

from vlmprune.kernels import choice, reference, trial


@pytest.fixture
def few(monkeypatch):
    """One op, which a GPU has to have two implementations of."""
    case = gpu_check.cases("cpu", 0)["top_k"]
    monkeypatch.setattr(gpu_check, "cases", lambda device, seed: {"top_k": case})
    monkeypatch.setattr(gpu_check, "required", lambda op, device: ["torch", "cuda"])
    monkeypatch.setattr(choice, "why_not", lambda name, op, device: None)
    monkeypatch.setattr(choice, "attempt", lambda name, op, args: reference.top_k(*args))


def missed():
    found = {"agreement": gpu_check.agreement("cpu")}
    return [row.what for row in gpu_table.kernel_rows(found, True) if row.met is False]


def test_agreement(few):
    assert missed() == []


@pytest.mark.parametrize("how", ["it may not", "it does not"])
def test_a_kernel_that_does_not_run_agrees_with_nothing(few, monkeypatch, how):
    if how == "it may not":
        monkeypatch.setattr(choice, "why_not", lambda name, op, device: "it failed in a trial\nPlease report this")
    else:
        monkeypatch.setattr(choice, "attempt", lambda name, op, args: "it failed in a trial")
    assert missed() == ["against the plain one: top_k [cuda]: it failed in a trial"]


def test_on_a_gpu_all_that_is_meant_for_one_has_to_run():
    assert gpu_check.required("top_k", "cuda") == ["torch", "cuda", "triton"]
    assert gpu_check.required("merge", "cuda") == ["torch", "triton"]


def test_a_first_use_that_a_capture_did_not_refuse_is_missed():
    said = {"apart": None, "refused": False, "said": []}
    rows = gpu_table.kernel_rows({"first_use_in_capture": {"merge": said, "top_k": said | {"refused": True}}}, True)
    assert [row.met for row in rows] == [False, True]


def test_verdicts_are_kept_for_the_steps_that_follow(monkeypatch):
    monkeypatch.setattr(trial, "in_a_process", lambda *args: {"reason": None, "lasting": True})
    monkeypatch.setattr(trial, "machine", lambda device: {"gpu": "any"})
    monkeypatch.setattr(trial, "verdicts", {})
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    kept = []
    monkeypatch.setattr(trial, "remembered", lambda about: None)
    monkeypatch.setattr(trial, "remember", lambda about, found: kept.append(about["op"]))
    tried = gpu_check.tried("cuda")
    assert list(tried) == ["top_k [cuda]", "top_k [triton]", "select_gather [cuda]", "select_gather [triton]",
                           "greedy [triton]", "attention_mass [triton]", "merge [triton]"]  # fmt: skip
    assert all(one["reason"] is None for one in tried.values())
    assert len(kept) == 7
