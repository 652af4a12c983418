"""What is true of all ops: they are good citizens of torch, and the choice between implementations."""

from __future__ import annotations

import warnings
from collections import Counter
from threading import Thread

import pytest
import tiny
import torch
import waits
from kernel_cases import samples
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import vlmprune
from vlmprune import kernels
from vlmprune.kernels import choice, reference

ops = torch.ops.vlmprune


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", samples())
def test_opcheck(name, grad):
    op = getattr(ops, name.partition(",")[0]).default
    torch.library.opcheck(op, samples(grad)[name])


class Calls(TorchDispatchMode):
    """Counts calls of our ops."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vlmprune":
            self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", samples())
def test_called_directly_it_is_the_same(name, monkeypatch):
    op, args = name.partition(",")[0], samples()[name]
    dispatched = getattr(ops, op)(*args)
    monkeypatch.setitem(kernels.ops.__dict__, "getattr", None)  # the way through torch
    with torch.no_grad():
        found = kernels.call(op, *args)
    for mine, theirs in zip(*[x if isinstance(x, list | tuple) else [x] for x in (found, dispatched)], strict=True):
        assert torch.equal(mine, theirs)


def test_whoever_listens_hears_the_op():
    """Past the dispatcher only where nothing rides on it: what looks on, traces or needs gradients sees one op."""
    args = samples()["select_gather"]
    with torch.no_grad():
        with Calls() as calls:
            kernels.call("select_gather", *args)
        assert calls.seen == {"select_gather": 1}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as run:
            kernels.call("select_gather", *args)
        assert "vlmprune::select_gather" in {event.key for event in run.key_averages()}
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args]
            assert kernels.call("select_gather", *fake)[0].shape == (2, 3, 4)
        assert kernels.call("select_gather", *fake)[0].shape == (2, 3, 4)  # a subclass, without its mode
        traced = make_fx(lambda *x: kernels.call("select_gather", *x, 3, True)[0])(*args[:-2])
        assert "vlmprune.select_gather" in traced.code
        graphs = []
        compiled = torch.compile(
            lambda *x: kernels.call("select_gather", *x)[0], fullgraph=True,
            backend=lambda graph, inputs: graphs.append(graph.code) or graph.forward,
        )  # fmt: skip
        assert torch.equal(compiled(*args), kernels.call("select_gather", *args)[0])
        assert "vlmprune.select_gather" in graphs[0]
    hidden = args[3].clone().requires_grad_()
    kernels.call("select_gather", *args[:3], hidden, *args[4:])[0].sum().backward()
    assert hidden.grad.sum() == 6 * 4  # of three rows in either sample


def test_a_profiler_of_all_threads_hears_the_op():
    from torch._C._profiler import _ExperimentalConfig

    args = samples()["select_gather"]
    every = _ExperimentalConfig(profile_all_threads=True)
    with torch.no_grad(), torch.profiler.profile(experimental_config=every) as run:
        assert not torch.autograd._profiler_enabled()
        thread = Thread(target=torch.no_grad()(kernels.call), args=("select_gather", *args))
        thread.start()
        thread.join()
    assert "vlmprune::select_gather" in {event.key for event in run.key_averages()}


def test_forward_gradients_are_those_of_the_op(monkeypatch):
    """They go on under `no_grad`. Kernels would drop them where plain torch does not."""
    monkeypatch.setattr(kernels.ops, "functions", {})
    args = list(samples()["select_gather"])
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        args[3] = torch.autograd.forward_ad.make_dual(args[3], torch.ones_like(args[3]))
        kernels.call("select_gather", *args)


@pytest.mark.parametrize("name", samples())
def test_a_tensor_without_values_has_a_shape(name):
    op, args = name.partition(",")[0], samples()[name]
    with torch.no_grad():
        expected = getattr(ops, op)(*args)
        found = kernels.call(op, *[x.to("meta") if isinstance(x, torch.Tensor) else x for x in args])
    for mine, theirs in zip(*[x if isinstance(x, list | tuple) else [x] for x in (found, expected)], strict=True):
        assert (mine.shape, mine.dtype, mine.device.type) == (theirs.shape, theirs.dtype, "meta")


def test_a_sign_that_waits_is_applied(monkeypatch):
    """Torch keeps the sign of an imaginary part apart from its memory, which is what a kernel would read."""
    given, args = [], list(samples()["select_gather"])
    monkeypatch.setattr(choice, "attempt", lambda name, op, args: given.extend(args) or reference.select_gather(*args))
    monkeypatch.setattr(choice, "why_not", lambda *args: None)
    args[3] = torch.complex(torch.zeros_like(args[3]), args[3]).conj().imag
    assert args[3].is_neg()
    with torch.no_grad(), kernels.use("cuda"):
        found = kernels.call("select_gather", *args)[0]
    assert not any(x.is_neg() for x in given if isinstance(x, torch.Tensor))
    assert torch.equal(found, reference.select_gather(*args)[0])


@pytest.mark.parametrize("name", samples())
def test_implementations_read_nothing_back(monkeypatch, name):
    """A dispatch mode does not look inside a custom op, so the engine's own test cannot see this."""
    plain, args = getattr(reference, name.partition(",")[0]), samples()[name]
    counted = waits.reads(lambda: plain(*args), monkeypatch)
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


@pytest.mark.parametrize("name", samples())
def test_no_gradient_goes_missing(name):
    """An op without a formula would fall back to torch's, which leaves gradients out and only warns."""
    op, args = getattr(ops, name.partition(",")[0]), list(samples()[name])
    wanted = {"top_k": [], "select_gather": [3, 5, 6], "greedy": [], "attention_mass": None, "merge": [0, 5]}
    floats = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    for i in floats:
        args[i] = args[i].clone().requires_grad_()
    out = op(*args)
    out = [x for x in (out if isinstance(out, tuple | list) else [out]) if x.requires_grad]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if wanted[op.__name__] is None:
            with pytest.raises(RuntimeError, match="attention_mass has no gradient"):
                out[0].sum().backward()
            with torch.no_grad():
                assert not op(*args).requires_grad
            return
        if out:
            sum(x.sum() for x in out).backward()
    assert [i for i in floats if args[i].grad is not None] == wanted[op.__name__]


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
