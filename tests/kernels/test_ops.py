"""What is true of all ops: they are good citizens of torch, the choice between implementations, the CUDA sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from importlib import util
from pathlib import Path

import pytest
import tiny
import torch
from kernel_cases import gather_inputs, merge_inputs
from torch.utils._python_dispatch import TorchDispatchMode
from waits import reads

import vlmprune
from vlmprune import kernels
from vlmprune.kernels import choice, cuda_ops, reference

ops = torch.ops.vlmprune


def samples(grad=False):
    """Arguments of every op."""
    hidden, ids, cos, sin = gather_inputs(2, 7, 4, torch.float32, "cpu")
    keep = torch.tensor([[1, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1]]).bool()
    scores, counts = torch.randn(2, 7), torch.tensor([3, 2])
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
    at = torch.randint(7, (2, 5))
    merged = merge_inputs(torch.float32, sparse=True)
    if grad:
        hidden.requires_grad_()
        merged[0] = merged[0].contiguous().requires_grad_()
        merged[5].requires_grad_()
    return {
        "top_k": (scores, counts, keep),
        "select_gather": (keep, None, hidden, ids, cos, sin, 3, True),
        "select_gather, padded": (keep, ~keep, hidden, ids, cos, sin, 5, False),
        "greedy": (torch.randn(2, 7, 4), torch.tensor([0, 6]), counts, torch.ones(2, 7) > 0, "max_min", 3),
        "greedy, log_det": (torch.randn(2, 7, 4), torch.tensor([0, 6]), counts, keep, "log_det", 3),
        "attention_mass": (query, key, 0.5, None, None, 0, None, None),
        "attention_mass, masked": (query, key, 0.5, at, ~keep, 3, torch.rand(2, 5), torch.randn(2, 7)),
        "merge": tuple(merged),
    }


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", samples())
def test_opcheck(name, grad):
    op = getattr(ops, name.partition(",")[0]).default
    torch.library.opcheck(op, samples(grad)[name])


@pytest.mark.parametrize("name", samples())
def test_implementations_read_nothing_back(monkeypatch, name):
    """A dispatch mode does not look inside a custom op, so the engine's own test cannot see this."""
    plain, args = getattr(reference, name.partition(",")[0]), samples()[name]
    counted = reads(lambda: plain(*args), monkeypatch)
    assert counted.total == 0, dict(counted.seen)


@pytest.mark.parametrize("name", samples())
def test_autocast_changes_nothing(name):
    """What is chosen must not depend on the mode that a forward happens to run in."""
    op, args = getattr(ops, name.partition(",")[0]), samples()[name]
    expected = op(*args)
    with torch.autocast("cpu", torch.bfloat16):
        found = op(*args)
    for mine, theirs in zip(*[x if isinstance(x, list | tuple) else [x] for x in (found, expected)], strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


class Calls(TorchDispatchMode):
    """Counts calls of our ops."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vlmprune":
            self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("methods", "options", "expected"),
    [
        ("fopru", {"keep": 5}, {"attention_mass": 1, "top_k": 1, "select_gather": 1}),
        ("todre", {"keep": 5, "tau": None}, {"attention_mass": 1, "greedy": 1, "select_gather": 1}),
        ("fastv", {"keep": 5}, {"attention_mass": 1, "top_k": 1, "select_gather": 1}),
        ("pool", {"keep": 4}, {"merge": 1, "select_gather": 1}),
        ([("vtc_cls", 10), ("fastv", 4)], {}, {"top_k": 2, "select_gather": 2}),
    ],
    ids=str,
)
def test_generate_calls_each_op_once_per_cut(tiny_model, methods, options, expected):
    """One gather per cut in the prefill, and nothing at all in the decode steps."""
    if not isinstance(methods, str):
        methods = [vlmprune.registry.find(name)(keep=keep) for name, keep in methods]
    model = tiny_model()
    prompt = tiny.prompt(model, [4, "image", 6], [(24, 24)])
    with vlmprune.patch(model, methods, **options), Calls() as calls:
        model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert {name: n for name, n in calls.seen.items() if name in expected} == expected
    assert set(calls.seen) <= set(kernels.OPS)
    with Calls() as calls:
        model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert not calls.seen


def test_a_flop_counter_sees_them():
    from torch.utils.flop_counter import FlopCounterMode

    args = samples()
    with FlopCounterMode(display=False) as counter:
        ops.attention_mass(*args["attention_mass"])
    assert counter.get_total_flops() == 2 * 2 * 4 * 5 * 7 * 8
    with FlopCounterMode(display=False) as counter:
        ops.greedy(*args["greedy"])
    assert counter.get_total_flops() == 2 * 2 * (3 - 1) * 7 * 4


def test_the_choice_can_be_forced(monkeypatch):
    ran = []
    monkeypatch.setattr(choice, "why_not", lambda *args: None)
    monkeypatch.setattr(choice, "attempt", lambda name, op, args: ran.append((name, op)) or reference.top_k(*args))
    args = samples()["top_k"]
    ops.top_k(*args)
    assert ran == []  # plain torch on a CPU
    with kernels.use("triton"):
        ops.top_k(*args)
        with kernels.use("cuda", "top_k"):
            ops.top_k(*args)
        ops.top_k(*args)
    ops.top_k(*args)
    assert ran == [("triton", "top_k"), ("cuda", "top_k"), ("triton", "top_k")]
    monkeypatch.setenv("VLMPRUNE_KERNELS", "cuda")
    ops.top_k(*args)
    with kernels.use("torch"):
        ops.top_k(*args)
    assert ran[3:] == [("cuda", "top_k")]
    monkeypatch.setenv("VLMPRUNE_KERNELS", "tritno")
    with pytest.raises(ValueError, match=r"VLMPRUNE_KERNELS: implementation 'tritno' .* Did you mean 'triton'"):
        ops.top_k(*args)


@pytest.mark.parametrize(("name", "op", "message"), [("tritn", "top_k", "Did you mean 'triton'"),
                                                     ("torch", "topk", "Did you mean 'top_k'")])  # fmt: skip
def test_unknown_names_are_refused(name, op, message):
    with pytest.raises(ValueError, match=message):
        kernels.use(name, op)


def test_a_fall_back_is_said_once_and_right(monkeypatch):
    monkeypatch.setattr(choice, "told", set())
    args = samples()["merge"]
    with kernels.use("cuda"):
        with pytest.warns(RuntimeWarning, match=r"vlmprune\.merge: not on cuda, since there is no CUDA C\+\+ for it"):
            out = ops.merge(*args)
        assert torch.equal(out, reference.merge(*args))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ops.merge(*args)


class OutOfResources(Exception):
    """Triton's, by its name: this shape does not fit this GPU."""


@pytest.mark.parametrize(("error", "tried"), [(RuntimeError("no compiler"), 1), (OutOfResources("shared memory"), 3)])
def test_an_implementation_that_fails(monkeypatch, error, tried):
    """One that does not build is not tried again; one that a shape is too large for may have the next one."""
    monkeypatch.setattr(choice, "told", set())
    monkeypatch.setattr(choice, "broken", {})
    monkeypatch.setattr(choice, "why_not", lambda name, op, device: choice.broken.get((name, op)))
    tries = []

    def fails(*args):
        tries.append(1)
        raise error

    monkeypatch.setattr(cuda_ops, "top_k", fails)
    args = samples()["top_k"]
    expected = reference.top_k(*args)
    with kernels.use("cuda"):
        with pytest.warns(RuntimeWarning, match=f"{type(error).__name__}: {error}"):
            assert torch.equal(ops.top_k(*args), expected)
        for _ in range(2):
            assert torch.equal(ops.top_k(*args), expected)
    assert len(tries) == tried


def test_a_broken_device_is_no_broken_implementation(monkeypatch):
    monkeypatch.setattr(choice, "why_not", lambda *args: None)
    monkeypatch.setattr(choice, "broken", {})

    def fails(*args):
        raise torch.AcceleratorError("an illegal memory access", 700)

    monkeypatch.setattr(cuda_ops, "top_k", fails)
    with kernels.use("cuda"), pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        ops.top_k(*samples()["top_k"])
    assert choice.broken == {}


def test_float64_goes_to_the_plain_one(monkeypatch):
    monkeypatch.setattr(choice, "told", set())
    monkeypatch.setattr(choice, "why_not", lambda *args: None)
    scores, counts, among = samples()["top_k"]
    with kernels.use("cuda"), pytest.warns(RuntimeWarning, match=r"scores are torch\.float64"):
        assert torch.equal(ops.top_k(scores.double(), counts, among), reference.top_k(scores, counts, among))
    assert choice.broken == {}


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100])
@pytest.mark.parametrize("source", sorted(cuda_ops.SOURCES.glob("*.cu")), ids=lambda path: path.name)
def test_cuda_sources_compile(tmp_path, source, arch):
    """For every supported architecture, without a warning."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH")
    command = ["nvcc", "-cubin", f"-arch=sm_{arch}", "-Werror=all-warnings", "-Xptxas", "-v", "-o", "out.cubin", source]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.cubin").stat().st_size > 1000


@pytest.mark.slow
def test_triton_kernels_compile_for_a_gpu(tmp_path):
    """Down to machine code: what the interpreter takes is not always what the compiler takes."""
    if util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    script = Path(__file__).parent / "compile_triton.py"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-P", str(script), "90", "bf16"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(" ok\n") == 11


@pytest.mark.parametrize("method", ["fopru", "pool", "fastv"])
def test_training_through_a_pruned_forward(monkeypatch, method):
    """Every gradient is what torch works out itself when the ops are plain functions."""
    model = tiny.model()
    prompt = tiny.prompt(model, [4, "image", 6], [(24, 24)])
    weights = [w for name, w in model.named_parameters() if "projector" in name or "language" in name]

    def gradients():
        loss = model(**prompt).logits[0, -3:].log_softmax(-1)[:, 7].sum()
        return torch.autograd.grad(loss, weights, allow_unused=True)

    with vlmprune.patch(model, method, keep=5):
        got = gradients()
        for name in ("select_gather", "merge"):
            monkeypatch.setattr(ops, name, getattr(reference, name))
        expected = gradients()
    assert sum(g is not None and bool(g.any()) for g in got) > 20
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
