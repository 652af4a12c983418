"""Every implementation of every op, on whatever machine this is.

With a GPU the kernels run on it. Without one Triton's run through its interpreter, and the CUDA sources are compiled
for the CPU (cuda_on_cpu.h); both compute what they compute, and say nothing about speed or races.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path

import pytest
import torch

from vlmprune import kernels
from vlmprune.kernels import choice, cuda_ops

GPU = torch.cuda.is_available()

NAMES = ("top_k", "select_gather")
LAUNCHER = """
#include "{here}/cuda_on_cpu.h"
#include "{sources}/select_gather.cu"
"""
ENTRY = """
extern "C" void launch_{name}(unsigned x, unsigned y, unsigned threads, void** args) {{
  fibers::launch(fibers::start<{name}>, x, y, threads, args);
}}
"""


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """`launch` of `cuda_ops` for tensors on the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("needs a GPU, or g++ to run CUDA sources on the CPU")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    text = LAUNCHER.format(here=Path(__file__).parent, sources=cuda_ops.SOURCES)
    (folder / "all.cpp").write_text(text + "".join(ENTRY.format(name=name) for name in NAMES))
    command = [
        "g++",
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Wno-unknown-pragmas",
        "-shared",
        "-fPIC",
        "-o",
        "all.so",
        "all.cpp",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(folder / "all.so"))

    def launch(name: str, grid: tuple, args: list, device: torch.device) -> None:
        held = []
        for arg in args:
            if isinstance(arg, torch.Tensor):
                assert arg.device.type == "cpu"
                held.append(ctypes.c_void_p(arg.data_ptr() if arg.numel() else None))
            else:
                assert -(2**31) <= arg < 2**31
                held.append(ctypes.c_int(arg))
        pointers = (ctypes.c_void_p * len(held))(*[ctypes.addressof(x) for x in held])
        getattr(library, f"launch_{name}")(*grid, cuda_ops.THREADS, pointers)

    return launch


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """CUDA C++ exists for the two ops whose tests say so."""
    if "implementation" in metafunc.fixturenames:
        names = ["torch", "triton"] + ["cuda"] * getattr(metafunc.module, "CUDA", False)
        metafunc.parametrize("implementation", names, indirect=True)


@pytest.fixture
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of an implementation, forced for this test; falling back to another one fails the test."""
    name = request.param
    if name == "triton" and util.find_spec("triton") is None:
        pytest.skip("triton is not installed (the test extra of setup.cfg brings it where it exists)")
    if name == "cuda" and not GPU:
        monkeypatch.setattr(cuda_ops, "launch", request.getfixturevalue("launcher"))
        monkeypatch.setattr(cuda_ops, "processors", lambda device: 2)
        monkeypatch.setattr(choice, "why_not", lambda *args: None)
    with kernels.use(name), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        monkeypatch.setattr(choice, "told", set())
        monkeypatch.setattr(choice, "broken", {})
        yield name


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if GPU else "cpu")
