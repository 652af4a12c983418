"""A device has to pass a trial before its kernels are trusted: small cases, against plain torch on the CPU.

The first trial of a machine runs in a process of its own, since an access out of bounds makes a CUDA context useless.
Its verdict is kept on disk, by GPU, driver, torch, Triton and the sources of this package; until there is one, and
while a CUDA graph is captured, plain torch runs.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vlmprune._version import __version__
from vlmprune.kernels import reference
from vlmprune.kernels.cases import CASES, difference
from vlmprune.kernels.checks import Refused

__all__ = ["examine", "folder", "verdict"]

LIMIT = 900  # seconds; a trial compiles up to fifty kernels
verdicts: dict[
    tuple[str, str, str], str | None
] = {}  # (implementation, op, device) -> why it failed, None if it did not
lock = threading.RLock()


def verdict(name: str, op: str, device: torch.device) -> str | None:
    """Why an implementation cannot be trusted with an op on a GPU, or None if it passed; finds out if nobody knows."""
    key = (name, op, str(device))
    if key in verdicts:
        return verdicts[key]
    with lock:
        if key in verdicts:
            return verdicts[key]
        about = {"op": f"{op} on {name}"} | machine(device)
        found = remembered(about)
        if found is None:
            if torch.cuda.is_current_stream_capturing():  # not now, and not for good
                return "its first use on this device is inside a CUDA-graph capture: call it once before"
            found = in_a_process(name, op, device)
            if found["lasting"]:
                remember(about, found)
        verdicts[key] = None if found["reason"] is None else found["reason"] + report(about, found)
        return verdicts[key]


def examine(name: str, op: str, device: torch.device) -> dict[str, Any]:
    """Run all cases of an op here and now.

    Returns:
        "reason": what went wrong, None if nothing did; "lasting": whether another try would say the same.
    """
    for label, args in CASES[op]():
        there = tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in args)
        try:
            got = getattr(importlib.import_module(f"vlmprune.kernels.{name}_ops"), op)(*there)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Refused:
            continue  # in use the next implementation gets these arguments
        except Exception as error:  # whatever goes wrong in here is what a trial is for
            return failed(label, error)
        apart = difference(op, args, got, getattr(reference, op)(*args))
        if apart:
            return {"reason": f"it failed in a trial ({label}: {apart})", "lasting": True}
    return {"reason": None, "lasting": True}


def failed(label: str, error: Exception) -> dict[str, Any]:
    """The verdict of a case that ended with an error."""
    first = (str(error).strip().splitlines() or [""])[0]
    if "out of memory" in first.lower():  # torch's, the driver's or Triton's
        return {"reason": "there was no memory to try it", "lasting": False}
    lasting = isinstance(error, torch.AcceleratorError)  # not a compiler that is missing today
    return {"reason": f"it failed in a trial ({label}: {type(error).__name__}: {first})", "lasting": lasting}


COMMAND = "import sys; from vlmprune.kernels import trial; trial.main(*sys.argv[1:])"


def in_a_process(name: str, op: str, device: torch.device) -> dict[str, Any]:
    """`examine` in a process of its own; one that dies has failed, one that cannot be had leaves the question open."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_LAUNCH_BLOCKING": "0"}
    index = torch.cuda.current_device() if device.index is None else device.index
    if not sys.executable:  # a program that Python is only a part of
        return {"reason": "it could not be tried on this device (no Python to start: sys.executable)", "lasting": False}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", COMMAND, name, op, f"cuda:{index}"],
            env=env, capture_output=True, text=True, timeout=LIMIT, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"reason": f"it could not be tried on this device ({error})", "lasting": False}
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if last.startswith("{"):
        return json.loads(last)
    end = (done.stderr.strip().splitlines() or [""])[-1]
    if done.returncode in (-4, -6, -7, -8, -11):  # a signal that a fault of its own sends
        return {"reason": f"it ended its process in a trial (signal {-done.returncode}: {end})", "lasting": True}
    return {"reason": f"it could not be tried on this device (exit {done.returncode}: {end})", "lasting": False}


def main(name: str, op: str, device: str) -> None:
    """What `in_a_process` starts: the last line that it prints is a verdict."""
    torch.cuda.set_device(device)
    print(json.dumps(examine(name, op, torch.device(device))), flush=True)
    os._exit(0)  # a broken context may not survive an orderly end, and all is said


def machine(device: torch.device) -> dict[str, str]:
    """What a verdict depends on."""
    seen, driver = torch.cuda.get_device_properties(device), str(torch._C._cuda_getDriverVersion())
    with contextlib.suppress(OSError):
        driver = Path("/proc/driver/nvidia/version").read_text().split("\n")[0]
    return versions() | {"gpu": seen.name, "arch": f"{seen.major}.{seen.minor}", "driver": driver}


@functools.cache
def versions() -> dict[str, str]:
    """Versions and a hash of this package's kernels."""
    here = Path(__file__).parent
    text = b"".join(p.read_bytes() for p in sorted([*here.glob("*.py"), *here.glob("csrc/*")]))
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return {"vlmprune": __version__, "torch": torch.__version__, "triton": triton,
            "sources": hashlib.sha256(text).hexdigest()[:16]}  # fmt: skip


def folder() -> Path:
    """Where verdicts are kept.

    Raises:
        OSError: nobody's home, as in containers that run as a user whom the system does not know.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlmprune" / "kernels"
    except RuntimeError as error:
        raise OSError(str(error)) from error


def file_of(about: dict[str, str]) -> Path:
    """A file for every verdict: processes that try different ops at one time do not overwrite each other's."""
    return folder() / f"{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]}.json"


def remembered(about: dict[str, str]) -> dict[str, Any] | None:
    """The verdict on an op on a machine; None if there is none that can be read."""
    try:
        kept = json.loads(file_of(about).read_text())
        return kept["found"] if kept["about"] == about and {"reason", "lasting"} <= kept["found"].keys() else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # not what `remember` wrote
        return None


def remember(about: dict[str, str], found: dict[str, Any]) -> None:
    """Keep a verdict. A home that cannot be written to costs a trial per process."""
    with contextlib.suppress(OSError):
        folder().mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder(), suffix=".tmp", delete=False) as file:
            file.write(json.dumps({"about": about, "found": found}, indent=1))
        Path(file.name).replace(file_of(about))


def report(about: dict[str, str], found: dict[str, Any]) -> str:
    """For a kernel that is wrong: what a bug report needs."""
    if not found["lasting"]:
        return ""
    lines = "".join(f"\n  {key}: {value}" for key, value in (about | {"found": found["reason"]}).items())
    return f"\nPlease report this, with these lines:{lines}\nThe next implementation runs instead"
