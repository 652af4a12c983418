"""The trial that a device has to pass, and where its verdict is kept. A CPU stands in for the device."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from kernel_cases import samples

from vlmprune import kernels
from vlmprune.kernels import cases, choice, cuda_ops, reference, trial

CPU = torch.device("cpu")
ABOUT = {"gpu": "NVIDIA Anything", "driver": "1", "torch": "2", "triton": "3", "sources": "abc"}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A GPU that nobody has tried; what it says is a list of what `in_a_process` is to answer."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(trial, "verdicts", {})
    monkeypatch.setattr(trial, "machine", lambda device: ABOUT)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    answers = []
    monkeypatch.setattr(trial, "in_a_process", lambda *args: answers.pop(0))
    return answers


PASSED, WRONG = {"reason": None, "lasting": True}, {"reason": "it failed in a trial (x)", "lasting": True}
OPEN = {"reason": "it could not be tried on this device (no)", "lasting": False}


@pytest.mark.parametrize(("answer", "kept"), [(PASSED, True), (WRONG, True), (OPEN, False)])
def test_a_verdict_is_found_once(machine, monkeypatch, answer, kept):
    machine.append(answer)
    first = trial.verdict("triton", "merge", CPU)
    assert trial.verdict("triton", "merge", CPU) == first
    assert (first is None) == (answer["reason"] is None)
    trial.verdicts.clear()  # another process
    if not kept:
        machine.append(PASSED)
    assert trial.verdict("triton", "merge", CPU) == (first if kept else None)
    trial.verdicts.clear()
    monkeypatch.setattr(trial, "machine", lambda device: ABOUT | {"driver": "2"})
    machine.append(PASSED)
    assert trial.verdict("triton", "merge", CPU) is None
    assert machine == []


def test_what_a_bug_report_needs(machine, monkeypatch):
    """One warning, with a block to copy; a device that could not be tried is no bug."""
    monkeypatch.setattr(choice, "told", set())
    monkeypatch.setattr(choice, "why_not", trial.verdict)
    machine.append(WRONG)
    args = samples()["merge"]
    with kernels.use("triton"), pytest.warns(RuntimeWarning) as seen:  # noqa: PT031 - said once
        for _ in range(2):
            assert torch.equal(torch.ops.vlmprune.merge(*args), reference.merge(*args))
    assert len(seen) == 1
    text = str(seen[0].message)
    assert "Please report this" in text
    assert all(f"\n  {key}: {value}\n" in text for key, value in ABOUT.items())
    machine.append(OPEN)
    assert "report" not in trial.verdict("triton", "greedy", CPU)


def test_a_capture_is_no_time_for_a_trial(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "inside a CUDA-graph capture" in trial.verdict("triton", "merge", CPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    machine.append(PASSED)
    assert trial.verdict("triton", "merge", CPU) is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"about": %s}', '{"about": %s, "found": null}', '{"about": %s, "found": {}}']
)
def test_a_file_that_cannot_be_read(machine, text):
    machine += [PASSED, PASSED]
    assert trial.verdict("triton", "merge", CPU) is None
    about = {"op": "merge on triton"} | ABOUT
    trial.file_of(about).write_text(text.replace("%s", json.dumps(about)))
    trial.verdicts.clear()
    assert trial.verdict("triton", "merge", CPU) is None
    assert machine == []


def nobodys_home():
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("home", ["a file", "nobody's"])
def test_a_home_that_cannot_be_written_to(machine, monkeypatch, tmp_path, home):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file") if home == "a file" else "")
    if home == "nobody's":
        monkeypatch.setattr(trial.Path, "home", nobodys_home)
    machine.append(PASSED)
    for _ in range(2):
        assert trial.verdict("triton", "merge", CPU) is None
    assert machine == []


def test_two_processes_keep_what_both_found(machine, monkeypatch):
    """Each asks for another op while the other's trial runs."""
    machine += [PASSED, PASSED]

    def tried(name, op, device):
        if op == "merge":  # meanwhile the other process
            trial.verdict("triton", "greedy", CPU)
        return machine.pop(0)

    monkeypatch.setattr(trial, "in_a_process", tried)
    for op in ("merge", "greedy", "merge"):
        trial.verdicts.clear()
        assert trial.verdict("triton", op, CPU) is None
    assert machine == []


def test_a_program_without_python(monkeypatch):
    """One that Python is embedded in."""
    monkeypatch.setattr(sys, "executable", None)
    found = trial.in_a_process("triton", "merge", torch.device("cuda", 0))
    assert "no Python to start" in found["reason"]
    assert not found["lasting"]


@pytest.mark.parametrize(
    ("body", "reason", "lasting"),
    [
        ("print('noise'); print('{\"reason\": null, \"lasting\": true}')", None, True),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "it ended its process in a trial (signal 11", True),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "it could not be tried", False),
        ("raise SystemExit('no context')", "it could not be tried on this device (exit 1: no context)", False),
        ("import time; time.sleep(60)", "it could not be tried", False),
    ],
)
def test_a_process_of_its_own(monkeypatch, body, reason, lasting):
    monkeypatch.setattr(trial, "COMMAND", body)
    monkeypatch.setattr(trial, "LIMIT", 20 if "sleep" not in body else 0.2)
    found = trial.in_a_process("triton", "merge", torch.device("cuda", 0))
    assert found["lasting"] == lasting
    assert found["reason"] is None if reason is None else found["reason"].startswith(reason)


def test_the_process_says_what_examine_finds(tmp_path):
    """The command itself, where there is no GPU: it cannot even begin, and says so."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: gpu_check.sh runs the trial itself")
    command = [sys.executable, "-P", "-c", trial.COMMAND, "cuda", "top_k", "cuda:0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "cuda" in done.stderr.splitlines()[-1].lower()


@pytest.mark.parametrize("op", ["top_k", "select_gather"])
def test_cuda_passes(cuda_on_cpu, op, monkeypatch):
    monkeypatch.setattr(cases, "COLUMNS", (1, 700, 9000))
    assert trial.examine("cuda", op, CPU) == PASSED


@pytest.mark.parametrize("op", ["merge", "greedy", "top_k"])
def test_triton_passes(op, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(cases, "COLUMNS", (1, 700))
    few = [
        case
        for case in cases.CASES[op]()
        if not any(f"{n} tokens" in case[0] for n in (1999, 4096, 5000, 16384, 17000))
    ]
    monkeypatch.setitem(cases.CASES, op, lambda: few)
    assert trial.examine("triton", op, CPU) == PASSED


@pytest.mark.parametrize("label", ["bias alone", "all masks", "NaN and infinity"])
def test_attention_of_what_is_no_number(monkeypatch, label):
    """The cases that a kernel is most likely to get wrong; all of them would take minutes in Triton's interpreter."""
    pytest.importorskip("triton")
    (case,) = [case for case in cases.CASES["attention_mass"]() if case[0] == label]
    monkeypatch.setitem(cases.CASES, "attention_mass", lambda: [case])
    assert trial.examine("triton", "attention_mass", CPU) == PASSED


def test_cases_have_one_answer():
    """Rounding must not decide: in float64 every greedy case picks the same."""
    for label, args in cases.CASES["greedy"]():
        if args[0].shape[1] < 2000:
            exact = reference.greedy(args[0].double(), *args[1:])
            assert cases.difference("greedy", args, reference.greedy(*args), exact) is None, label


def wrong_values(*args):
    out = reference.top_k(*args)
    out.flatten()[-1] ^= True
    return out


def no_memory(*args):
    raise torch.AcceleratorError("top_k: out of memory (2)", 2)


def access_out_of_bounds(*args):
    raise torch.AcceleratorError("an illegal memory access", 700)


@pytest.mark.parametrize(
    ("kernel", "reason", "lasting"),
    [
        (wrong_values, "output 0 differs in 1 of 5 places, first at", True),
        (access_out_of_bounds, "illegal memory access", True),
        (lambda *args: args[99], "IndexError", False),
        (no_memory, "there was no memory to try it", False),
    ],
)
def test_a_wrong_kernel_fails(monkeypatch, kernel, reason, lasting):
    monkeypatch.setattr(cuda_ops, "top_k", kernel)
    found = trial.examine("cuda", "top_k", CPU)
    assert reason in found["reason"]
    assert found["lasting"] == lasting
    json.dumps(found)
