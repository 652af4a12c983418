"""What happens where an implementation cannot run: for the right reason, on the right device, said once."""

from __future__ import annotations

import time
import warnings
from threading import Event, Thread

import pytest
import torch
from kernel_cases import samples

from vlmprune import kernels
from vlmprune.kernels import checks, choice, cuda_ops, reference, trial
from vlmprune.kernels.driver import LoadError

ops = torch.ops.vlmprune
WHY_NOT = choice.why_not  # which the fixture replaces
pytestmark = pytest.mark.usefixtures("cuda_on_cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(choice, "told", set())


class OutOfResources(Exception):
    """Triton's, by its name: this shape does not fit this GPU."""


class Compiler(Exception):
    """One of the dozen kinds that Triton's compiler raises."""

    __module__ = "triton.compiler.errors"


def building_fails():
    """As MLIR does: a plain RuntimeError from within the compiler."""
    exec("raise RuntimeError('PassManager::run failed')", {"__name__": "triton.backends.nvidia.compiler"})


@pytest.mark.parametrize(
    ("error", "tries"),
    [(LoadError("no driver"), 1), (Compiler("no"), 1), (building_fails, 1), (ImportError("no triton"), 1),
     (OutOfResources("shared memory"), 3), (checks.Refused("not this shape"), 3)],
    ids=["load", "compiler", "building", "import", "resources", "refused"],
)  # fmt: skip
def test_an_implementation_that_fails(monkeypatch, error, tries):
    """One that does not build is not tried again; one that a shape is too large for may have the next one."""
    tried = []

    def fails(*args):
        tried.append(1)
        if callable(error):
            error()
        raise error

    monkeypatch.setattr(cuda_ops, "top_k", fails)
    args = samples()["top_k"]
    with kernels.use("cuda"), pytest.warns(RuntimeWarning, match=r"vlmprune\.top_k: not on cuda, since") as seen:  # noqa: PT031 - said once
        for _ in range(3):
            assert torch.equal(ops.top_k(*args), reference.top_k(*args))
    assert len(tried) == tries
    assert len(seen) == 1
    assert set(choice.broken) == ({("cuda", "top_k", "cpu")} if tries == 1 else set())


@pytest.mark.parametrize(
    "error",
    [torch.AcceleratorError("an illegal memory access", 700), torch.OutOfMemoryError("no"), IndexError("a bug"),
     RuntimeError("a launch that failed")],
    ids=str,
)  # fmt: skip
def test_what_a_compiler_does_not_explain_is_raised(monkeypatch, error):
    def fails(*args):
        raise error

    monkeypatch.setattr(cuda_ops, "top_k", fails)
    with kernels.use("cuda"), pytest.raises(type(error), match=str(error)):
        ops.top_k(*samples()["top_k"])
    assert choice.broken == {}


def changed(name, **new):
    """Arguments of an op by name, some of them others."""
    import inspect

    args = dict(zip(inspect.signature(getattr(reference, name)).parameters, samples()[name], strict=True))
    return list((args | new).values())


@pytest.mark.parametrize(
    ("op", "new", "message"),
    [
        ("top_k", {"counts": torch.ones(3).long()}, r"top_k: counts is \(3,\), and \(1 or 2\) is needed"),
        ("top_k", {"candidates": torch.ones(2, 6) > 0}, r"candidates is \(2, 6\), and \(2, 7\) is needed"),
        ("top_k", {"candidates": torch.ones(2, 7)}, "candidates is torch.float32, and bools is needed"),
        ("select_gather", {"real": torch.ones(1, 7) > 0}, r"real is \(1, 7\), and \(2, 7\) is needed"),
        ("select_gather", {"hidden": torch.ones(2, 8, 4)}, r"hidden is \(2, 8, 4\), and \(2, 7, \*\) is needed"),
        ("select_gather", {"ids": torch.ones(2, 6).long()}, r"ids is \(2, 6\)"),
        ("select_gather", {"sin": torch.ones(2, 7, 3)}, r"sin is \(2, 7, 3\)"),
        ("greedy", {"first": torch.zeros(1).long()}, r"first is \(1,\)"),
        ("greedy", {"candidates": torch.ones(2, 8) > 0}, r"candidates is \(2, 8\)"),
        ("attention_mass", {"key": torch.ones(2, 3, 7, 8)}, "4 query heads cannot be grouped over 3 key heads"),
        ("attention_mass", {"key": torch.ones(2, 2, 7, 9)}, r"key is \(2, 2, 7, 9\), and \(2, 2, 7, 8\) is needed"),
        ("attention_mass", {"real": torch.ones(2, 8) > 0}, r"real is \(2, 8\), and \(1 or 2, 7\) is needed"),
        ("attention_mass", {"window": 3}, "a window needs `at`"),
        ("merge", {"keep": torch.ones(1, 1) > 0}, r"keep is \(1, 1\)"),
        ("merge", {"weight": torch.ones(1, 1)}, r"weight is \(1, 1\)"),
    ],
)  # fmt: skip
def test_bad_arguments_are_the_callers_fault(op, new, message):
    """They raise before any kernel sees them, and no implementation is worse off."""
    for name in ("torch", "cuda"):
        with kernels.use("torch"):
            getattr(ops, op)(*samples()[op])  # what passes is remembered
        with kernels.use(name), pytest.raises(ValueError, match=message):
            getattr(ops, op)(*changed(op, **new))
    assert choice.broken == {}
    with kernels.use("cuda", "top_k"), warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.top_k(*samples()["top_k"])


def test_tensors_on_two_devices_are_refused():
    scores, counts, among = samples()["top_k"]
    with pytest.raises(ValueError, match="tensors are on cpu and meta: move them to one device"):
        checks.check("top_k", (scores, counts.to("meta"), among))


def test_what_one_device_does_not_take_another_may(monkeypatch):
    monkeypatch.setitem(choice.broken, ("cuda", "top_k", "cuda:1"), "that one does not take it")
    monkeypatch.setattr(trial, "verdict", lambda name, op, device: None)
    assert [WHY_NOT("cuda", "top_k", torch.device("cuda", i)) for i in (0, 1)] == [None, "that one does not take it"]


def test_too_many_columns_are_said_once():
    with kernels.use("cuda"), pytest.warns(RuntimeWarning, match="more than") as seen:  # noqa: PT031 - said once
        for columns in (2**21, 2**21 + 1):
            scores = torch.zeros(1, columns)
            ops.top_k(scores, torch.tensor([1]), scores == 0)
    assert len(seen) == 1


def test_float64_goes_to_the_plain_one():
    scores, counts, among = samples()["top_k"]
    with kernels.use("cuda"), pytest.warns(RuntimeWarning, match=r"scores are torch\.float64"):
        assert torch.equal(ops.top_k(scores.double(), counts, among), reference.top_k(scores, counts, among))
    assert choice.broken == {}


def test_triton_compiles_nothing_while_a_graph_is_captured(monkeypatch):
    """Its own hook before a compilation raises, within the launch alone, and only for a thread that captures."""
    knobs = pytest.importorskip("triton.knobs")
    from vlmprune.kernels import triton_common

    class Kernel:
        compiled = False

        def __getitem__(self, grid):
            return self.launch

        def launch(self, *args, **options):
            if knobs.runtime.jit_cache_hook is not None:
                knobs.runtime.jit_cache_hook(key="", repr="")
            self.compiled = True

    def start(capturing, here):
        kernel = Kernel()
        monkeypatch.setattr(triton_common, "capturing", lambda device: capturing)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: here)
        triton_common.start(torch.device("cpu"), kernel, (1,))
        return kernel.compiled

    with pytest.raises(checks.Refused, match="inside a CUDA-graph capture"):
        start(True, True)
    assert knobs.runtime.jit_cache_hook is None
    assert start(True, False)
    assert start(False, False)


def test_threads_that_capture_at_one_time_leave_no_hook():
    knobs = pytest.importorskip("triton.knobs")
    from vlmprune.kernels import triton_common

    entered, leave = Event(), [Event(), Event()]

    def capture(which):
        with triton_common.loaded_only():
            entered.set()
            leave[which].wait(10)

    threads = [Thread(target=capture, args=(i,)) for i in range(2)]
    threads[0].start()
    entered.wait(10)
    threads[1].start()
    time.sleep(0.2)  # until it is inside too, or waits
    for event, thread in zip(leave, threads, strict=True):  # the first to come is the first to go
        event.set()
        thread.join()
    assert knobs.runtime.jit_cache_hook is None
