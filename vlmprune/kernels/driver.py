"""The CUDA driver, called through ctypes: it compiles the PTX that ships with the package and starts its kernels.

Needs no toolkit, no compiler and no header: the driver's library comes with the driver. It keeps what it compiled in a
cache on disk of its own (`~/.nv/ComputeCache`).
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["LoadError", "current_stream", "launch", "load", "loaded"]

NAMES = ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1", "libcuda.so")
BUFFER_POINTER, BUFFER_SIZE = 1, 2
HANDLE, HANDLES = ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
SIGNATURES = {
    "cuInit": [ctypes.c_uint],
    "cuDeviceGet": [ctypes.POINTER(ctypes.c_int), ctypes.c_int],
    "cuDevicePrimaryCtxRetain": [HANDLES, ctypes.c_int],
    "cuCtxSetCurrent": [HANDLE],
    "cuModuleLoadData": [HANDLES, ctypes.c_char_p],
    "cuModuleGetFunction": [HANDLES, HANDLE, ctypes.c_char_p],
    "cuLaunchKernel": [HANDLE, *[ctypes.c_uint] * 7, HANDLE, HANDLE, HANDLE],
    "cuGetErrorString": [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)],
}


class Extra(ctypes.Structure):
    """cuLaunchKernel's `extra`: names, each before its value, and 0 for their end."""

    _fields_ = (
        ("pointer", HANDLE),
        ("arguments", ctypes.c_char_p),
        ("length", HANDLE),
        ("size", HANDLE),
        ("end", HANDLE),
    )


class LoadError(Exception):
    """The driver's library is not there, or the driver did not take the PTX."""


@lru_cache(maxsize=1)
def library() -> Any:
    """The driver's library with typed entry points."""
    for name in NAMES:
        try:
            found = ctypes.CDLL(name)
        except OSError:
            continue
        return typed(found)
    raise LoadError(f"the NVIDIA driver's library ({NAMES[0]}) is not there")


def typed(found: Any) -> Any:
    """Set the argument types of the entry points that are used."""
    for name, types in SIGNATURES.items():
        entry = getattr(found, name)
        entry.argtypes, entry.restype = types, ctypes.c_int
    return found


def check(status: int, what: str, kind: type[Exception]) -> None:
    """Raise `kind` for a status that is no success."""
    if status:
        text = ctypes.c_char_p()
        library().cuGetErrorString(status, ctypes.byref(text))
        raise kind(f"{what}: {(text.value or b'unknown error').decode()} ({status})")


modules: dict[tuple[Path, int], tuple[int, int]] = {}  # (PTX, device) -> context, module
functions: dict[tuple[Path, str, int], tuple[int, int]] = {}  # (PTX, kernel, device) -> context, function


def loaded(path: Path, name: str, device: int) -> bool:
    """Whether a kernel can be started on a device without loading anything."""
    return (path, name, device) in functions


def load(path: Path, name: str, device: int) -> tuple[int, int]:
    """Context and function of a kernel on a device; a file is compiled once for all its kernels.

    Raises:
        LoadError: there is no driver, or it does not take the file.
    """
    found = functions.get((path, name, device))
    if found is None:
        context, module = modules.get((path, device)) or load_module(path, device)
        function = HANDLE()
        check(library().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), name, LoadError)
        found = functions[path, name, device] = context, function.value
    return found


def load_module(path: Path, device: int) -> tuple[int, int]:
    """Compile a PTX file in a device's primary context, which is the one that torch uses."""
    driver, number, context, module = library(), ctypes.c_int(), HANDLE(), HANDLE()
    check(driver.cuInit(0), "cuInit", LoadError)
    check(driver.cuDeviceGet(ctypes.byref(number), device), f"device {device}", LoadError)
    check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), number), "the context", LoadError)
    check(driver.cuCtxSetCurrent(context), "the context", LoadError)
    check(driver.cuModuleLoadData(ctypes.byref(module), path.read_bytes()), path.name, LoadError)
    return modules.setdefault((path, device), (context.value, module.value))


def current_stream(device: int) -> int:
    """Address of torch's current stream on a device."""
    return torch._C._cuda_getCurrentRawStream(device)  # what Triton's launcher calls too; the public way takes longer


def launch(
    kernel: tuple[int, int], grid: tuple[int, int], threads: int, stream: int, arguments: bytes, name: str = "a kernel"
) -> None:
    """Start a kernel.

    Args:
        kernel: what `load` returned.
        grid: blocks in x and y, none of them 0.
        threads: threads of a block.
        stream: a CUDA stream's address, 0 for the default one.
        arguments: every argument at the next multiple of its size.

    Raises:
        torch.AcceleratorError: the device did not take it.
    """
    context, function = kernel
    driver, size = library(), ctypes.c_size_t(len(arguments))
    extra = Extra(BUFFER_POINTER, arguments, BUFFER_SIZE, ctypes.addressof(size))
    driver.cuCtxSetCurrent(context)  # a thread that has only just come may have none
    status = driver.cuLaunchKernel(function, *grid, 1, threads, 1, 1, 0, stream, None, ctypes.byref(extra))
    if status:
        check(status, name, torch.AcceleratorError)
