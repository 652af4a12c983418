"""Which implementation of an op runs: the forced one, or the first that can, with the plain one always there."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import traceback
import warnings
from collections.abc import Callable
from importlib import util
from typing import Any

import torch

from vlmprune.kernels import checks, greedy_cpu, reference, trial
from vlmprune.kernels.checks import Refused
from vlmprune.kernels.driver import LoadError

__all__ = ["IMPLEMENTATIONS", "OPS", "broken", "capturing", "named", "run", "use"]

IMPLEMENTATIONS = ("auto", "torch", "triton", "cuda")
OPS = ("top_k", "select_gather", "greedy", "attention_mass", "merge")

# CUDA C++ exists where the index arithmetic matters most; the rest of the list is tried in order.
ON_GPU = {op: ("cuda", "triton") if op in ("top_k", "select_gather") else ("triton",) for op in OPS}

VARIABLE = "VLMPRUNE_KERNELS"
forced: dict[str, str] = {}
broken: dict[tuple[str, str, str], str] = {}  # (implementation, op, device) -> what its compiler or loader said


class use:
    """Force an implementation: "torch", "triton", "cuda", or "auto" for the default again.

    Holds from the call on, for the whole process; in a `with` statement until its end. An implementation that cannot
    run here (no GPU, no Triton, a dtype it does not have) is replaced by the plain one, and a warning says so once.
    The environment variable `VLMPRUNE_KERNELS` sets the same from outside; `use` wins.

    Args:
        name: one of `IMPLEMENTATIONS`.
        ops: names of ops (`OPS`); none means all.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(self, name: str, *ops: str):
        check("implementation", name, IMPLEMENTATIONS)
        for op in ops:
            check("op", op, OPS)
        self.before = dict(forced)
        forced.update(dict.fromkeys(ops or OPS, name))

    def __enter__(self) -> use:
        return self

    def __exit__(self, *error: object) -> None:
        forced.clear()
        forced.update(self.before)


def check(what: str, name: str, allowed: tuple[str, ...]) -> None:
    if name not in allowed:
        near = difflib.get_close_matches(str(name), allowed, 1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{what} {name!r} is not one of {', '.join(map(repr, allowed))}.{meant}")


def wanted(op: str) -> str:
    """What `use` or the environment asks for."""
    return forced.get(op) or named(None)


def named(name: str | None) -> str:
    """The implementation `name`, else the one of the environment, else "auto".

    Raises:
        ValueError: an unknown one.
    """
    name = name or os.environ.get(VARIABLE) or "auto"
    check(f"{VARIABLE}: implementation", name, IMPLEMENTATIONS)
    return name


def why_not(name: str, op: str, device: torch.device) -> str | None:
    """Why an implementation cannot run on `device`, or None. Finds out about a device that is new (`trial.py`)."""
    if (name, op, str(device)) in broken:
        return broken[name, op, str(device)]
    if reason := (no_cuda if name == "cuda" else no_triton)(op, device):
        return reason
    return trial.verdict(name, op, device) if device.type == "cuda" else None


def no_cuda(op: str, device: torch.device) -> str | None:
    """Why there can be no CUDA C++ of an op on a device, or None."""
    if op not in ("top_k", "select_gather"):
        return "there is no CUDA C++ for it"
    return "the tensors are not on an NVIDIA GPU" if device.type != "cuda" or torch.version.hip else None


def no_triton(op: str, device: torch.device) -> str | None:
    """Why Triton cannot run on a device, or None."""
    if util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the tensors are not on a GPU (TRITON_INTERPRET=1 interprets the kernels on a CPU)"
    return None


def run(op: str, *args: Any) -> Any:
    """Run an op on the implementation that `use` asks for or that is the default for where the first tensor lives.

    Raises:
        ValueError: tensors of shapes or kinds that the op does not have, or on several devices.
    """
    checks.check(op, args)
    device, name = args[0].device, wanted(op)
    names = (ON_GPU[op] if device.type == "cuda" else ()) if name == "auto" else () if name == "torch" else (name,)
    return at_home(device, first_that_can, op, names, args)


def first_that_can(op: str, names: tuple[str, ...], args: tuple) -> Any:
    """The result of the first implementation that has one; plain torch always has."""
    device = args[0].device
    for name in names:
        reason = why_not(name, op, device)
        if reason is None:
            result = attempt(name, op, args)
            if not isinstance(result, str):
                return result
            reason = result
        tell(name, op, device, reason)
    return plain(op, device)(*args)


def plain(op: str, device: torch.device) -> Callable:
    """The plain torch of an op. Picking reads what it has picked where that costs nothing."""
    return greedy_cpu.greedy if op == "greedy" and device.type == "cpu" else getattr(reference, op)


def at_home(device: torch.device, function: Callable, *args: Any) -> Any:
    """Call a function on the tensors' own GPU, whichever is the current one, and in the dtypes that an op asks for.

    A function and no context manager, which would cost as much as a launch where there is nothing to change.
    """
    away = device.type == "cuda" and device.index is not None and device.index != torch.cuda.current_device()
    cast = torch.is_autocast_enabled(device.type)
    if not away and not cast:
        return function(*args)
    with contextlib.ExitStack() as stack:
        if away:
            stack.enter_context(torch.cuda.device(device))
        if cast:
            stack.enter_context(torch.autocast(device.type, enabled=False))
        return function(*args)


def capturing(device: torch.device) -> bool:
    """Whether work on `device` is being captured into a CUDA graph instead of run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def attempt(name: str, op: str, args: tuple) -> Any:
    """The op's result, or a string that says why there is none.

    What neither the arguments nor a compiler explains is raised: it is a fault that a fall back would hide.
    """
    device = args[0].device
    try:
        module = importlib.import_module(f"vlmprune.kernels.{name}_ops")
        return getattr(module, op)(*args)
    except Refused as refused:
        return str(refused)
    except Exception as error:
        if not of_building(error):
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        reason = f"it failed here ({type(error).__name__}: {first})"
        # for one shape on this GPU, or at this moment: others may fit
        if type(error).__name__ != "OutOfResources" and "out of memory" not in first:
            broken[name, op, str(device)] = reason
        return reason


# where Triton compiles and loads; its launches are elsewhere (triton.runtime.jit, triton.backends.*.driver)
BUILDERS = ("triton.compiler", "triton.runtime.build", "triton.runtime.driver", "triton.runtime.autotuner",
            "triton.backends.nvidia.compiler", "triton.backends.amd.compiler")  # fmt: skip


def of_building(error: BaseException) -> bool:
    """Whether an exception says that a kernel could not be compiled or loaded, which another call would not change."""
    kind = type(error)
    if isinstance(error, LoadError | ImportError) or kind.__name__ == "OutOfResources":
        return True
    if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError):
        return False
    if kind.__module__.startswith("triton."):
        return True
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(name.startswith(BUILDERS) for name in frames)


told: set[tuple[str, str, str, str]] = set()


def tell(name: str, op: str, device: torch.device, reason: str) -> None:
    """Say once that an implementation was replaced."""
    if (name, op, str(device), reason) not in told:
        told.add((name, op, str(device), reason))
        warnings.warn(f"vlmprune.{op}: not on {name}, since {reason}.", RuntimeWarning, stacklevel=6)
