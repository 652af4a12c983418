"""Which implementation of an op runs: the forced one, or the first that can, with the plain one always there."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from importlib import util
from typing import Any

import torch

from vlmprune.kernels import reference

__all__ = ["IMPLEMENTATIONS", "OPS", "Refused", "broken", "named", "run", "use"]

IMPLEMENTATIONS = ("auto", "torch", "triton", "cuda")
OPS = ("top_k", "select_gather", "greedy", "attention_mass", "merge")

# CUDA C++ exists where the index arithmetic matters most; the rest of the list is tried in order.
ON_GPU = {op: ("cuda", "triton") if op in ("top_k", "select_gather") else ("triton",) for op in OPS}

VARIABLE = "VLMPRUNE_KERNELS"
forced: dict[str, str] = {}
broken: dict[tuple[str, str], str] = {}  # (implementation, op) -> why it failed once in this process


class Refused(Exception):
    """Raised by an implementation for arguments that it does not have; other arguments may still go to it."""


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
    """Why an implementation cannot run on `device`, or None."""
    if (name, op) in broken:
        return broken[name, op]
    if name == "cuda":
        if op not in ("top_k", "select_gather"):
            return "there is no CUDA C++ for it"
        if device.type != "cuda" or torch.version.hip:
            return "the tensors are not on an NVIDIA GPU"
        return None if hasattr(torch.cuda, "_compile_kernel") else "this torch has no run-time compiler (2.9 has)"
    if util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the tensors are not on a GPU (TRITON_INTERPRET=1 interprets the kernels on a CPU)"
    return None


def run(op: str, *args: Any) -> Any:
    """Run an op on the implementation that `use` asks for or that is the default for where the first tensor lives."""
    device, name = args[0].device, wanted(op)
    plain: Callable = getattr(reference, op)
    names = (ON_GPU[op] if device.type == "cuda" else ()) if name == "auto" else (name,)
    with at_home(device):
        for name in names:
            if name == "torch":
                break
            reason = why_not(name, op, device)
            if reason is None:
                reason = attempt(name, op, args)
                if not isinstance(reason, str):
                    return reason
            tell(name, op, reason)
        return plain(*args)


@contextlib.contextmanager
def at_home(device: torch.device) -> Iterator[None]:
    """Launch on the tensors' own GPU, whichever is the current one, and in the dtypes that an op asks for."""
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def attempt(name: str, op: str, args: tuple) -> Any:
    """The op's result, or a string that says why there is none."""
    try:
        module = importlib.import_module(f"vlmprune.kernels.{name}_ops")
        return getattr(module, op)(*args)
    except Refused as refused:
        return str(refused)
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # the device's own trouble, which nothing else escapes
        raise
    except Exception as error:  # compilers raise a dozen kinds; a kernel that does not build must not end a run
        first = (str(error).strip().splitlines() or [""])[0]
        reason = f"it failed here ({type(error).__name__}: {first})"
        if type(error).__name__ != "OutOfResources":  # Triton's, for one shape on this GPU: others may fit
            broken[name, op] = reason
        return reason


told: set[tuple[str, str, str]] = set()


def tell(name: str, op: str, reason: str) -> None:
    """Say once that an implementation was replaced."""
    if (name, op, reason) not in told:
        told.add((name, op, reason))
        warnings.warn(f"vlmprune.{op}: not on {name}, since {reason}.", RuntimeWarning, stacklevel=4)
