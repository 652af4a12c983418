"""Every implementation of every op, on whatever machine this is.

With a GPU the kernels run on it. Without one Triton's run through its interpreter, and the CUDA sources are compiled
for the CPU (cuda_on_cpu.h); both compute what they compute, and say nothing about speed or races.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from importlib import util
from pathlib import Path

import pytest
import torch

from vlmprune import kernels
from vlmprune.kernels import choice, cuda_ops, driver

GPU = torch.cuda.is_available()

SOURCE = """
#include "{here}/cuda_on_cpu.h"
#include "{sources}/select_gather.cu"
static bool added = fibers::add<top_k>("top_k") && fibers::add<choose>("choose") &&
                    fibers::add<select_gather>("select_gather");
"""


@pytest.fixture(scope="session")
def fake_driver(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """A library with the CUDA driver's entry points, which runs the kernels of `csrc/` on the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("needs a GPU, or g++ to run CUDA sources on the CPU")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    (folder / "all.cpp").write_text(SOURCE.format(here=Path(__file__).parent, sources=cuda_ops.SOURCES))
    command = "g++ -std=c++17 -O1 -Wall -Wno-unknown-pragmas -shared -fPIC -o all.so all.cpp".split()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return driver.typed(ctypes.CDLL(str(folder / "all.so")))


@pytest.fixture
def cuda_on_cpu(fake_driver: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """The CUDA implementations run for tensors on the CPU; the fake driver, which has loaded nothing yet."""
    monkeypatch.setattr(driver, "library", lambda: fake_driver)
    monkeypatch.setattr(driver, "current_stream", lambda device: 0)
    monkeypatch.setattr(driver, "modules", {})
    monkeypatch.setattr(driver, "functions", {})
    monkeypatch.setattr(cuda_ops, "processors", lambda device: 2)
    monkeypatch.setattr(choice, "why_not", lambda name, op, device: choice.broken.get((name, op, str(device))))
    monkeypatch.setattr(choice, "broken", {})
    for counter in ("loads", "fails"):
        ctypes.c_int.in_dll(fake_driver, counter).value = 0
    return fake_driver


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
        request.getfixturevalue("cuda_on_cpu")
    with kernels.use(name), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        monkeypatch.setattr(choice, "told", set())
        monkeypatch.setattr(choice, "broken", {})
        yield name


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture
def ptxas() -> str:
    """The assembler that comes with Triton, which knows what Triton writes, or one on the PATH."""
    if util.find_spec("triton") is not None:
        import triton

        bundled = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas-blackwell"
        if bundled.exists():
            return str(bundled)
    found = shutil.which("ptxas")
    if found is None:
        pytest.skip("there is no ptxas")
    return found
