"""The PTX that is shipped, and how it reaches the driver; a fake driver runs the kernels on the CPU."""

from __future__ import annotations

import ctypes
import re
import shutil
import struct
import subprocess
import time
import warnings
import zlib

import pytest
import torch
from kernel_cases import gather_inputs, samples

from vlmprune import kernels
from vlmprune.kernels import choice, cuda_ops, driver, ops, reference

SOURCES = sorted(cuda_ops.SOURCES.glob("*.cu"))
ENTRY = re.compile(r"\.visible \.entry (\w+)\((.*?)\)", re.DOTALL)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_the_ptx_is_up_to_date(source):
    """After a change of a source: scripts/build_ptx.py."""
    ptx = source.with_suffix(".ptx").read_text()
    assert ptx.startswith(cuda_ops.ptx_head(source))
    assert ".version 8.0\n" in ptx  # CUDA 12.0: drivers from 525 on
    assert ".target sm_75\n" in ptx
    assert len(zlib.compress(ptx.encode())) < 60_000


def test_arguments_are_those_of_the_ptx():
    """Pointers and numbers, in this order, of which `struct` makes what the driver takes apart."""
    found = {}
    for name, parameters in ENTRY.findall(cuda_ops.PTX.read_text()):
        kinds = re.findall(r"\.param \.(u64|u32) ", parameters)
        found[name] = struct.calcsize("".join("Q" if kind == "u64" else "i" for kind in kinds)), sorted(kinds)[::-1]
        assert kinds == found[name][1]
    assert {name: size for name, (size, _) in found.items()} == {n: p.size for n, p in cuda_ops.PACK.items()}


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_the_ptx_assembles(tmp_path, source, arch, ptxas):
    """For every architecture, and nothing spills."""
    command = [ptxas, "-v", f"-arch=sm_{arch}", "-o", tmp_path / "out.cubin", source.with_suffix(".ptx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Compiling entry function") == 3
    assert set(re.findall(r"(\d+) bytes spill", done.stderr)) == {"0"}


def test_the_source_compiles_without_a_warning(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH")
    for source in SOURCES:
        command = ["nvcc", "-ptx", "-arch=sm_75", "-Werror=all-warnings", "-o", tmp_path / "out.ptx", source]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_one_load_for_all_kernels(cuda_on_cpu):
    args = samples()
    with kernels.use("cuda"):
        for _ in range(2):
            torch.ops.vlmprune.top_k(*args["top_k"])
            torch.ops.vlmprune.select_gather(*args["select_gather"])
    assert ctypes.c_int.in_dll(cuda_on_cpu, "loads").value == 1


def test_a_driver_that_does_not_take_it(cuda_on_cpu, monkeypatch):
    monkeypatch.setattr(choice, "told", set())
    ctypes.c_int.in_dll(cuda_on_cpu, "fails").value = 1
    args = samples()["top_k"]
    with (  # noqa: PT031 - said once
        kernels.use("cuda"),
        pytest.warns(RuntimeWarning, match=r"LoadError: select_gather\.ptx: the fake driver says"),
    ):
        for _ in range(2):
            assert torch.equal(torch.ops.vlmprune.top_k(*args), reference.top_k(*args))
    assert ctypes.c_int.in_dll(cuda_on_cpu, "loads").value == 1


def test_a_machine_without_a_driver(monkeypatch):
    monkeypatch.setattr(driver, "NAMES", ("libnothing_of_that_name.so",))
    driver.library.cache_clear()
    with pytest.raises(driver.LoadError, match="libnothing_of_that_name"):
        driver.library()
    driver.library.cache_clear()


def test_nothing_is_loaded_while_a_graph_is_captured(cuda_on_cpu, monkeypatch):
    """Plain torch runs, the capture goes on, and afterwards the kernel is as good as new."""
    monkeypatch.setattr(choice, "told", set())
    monkeypatch.setattr(cuda_ops, "capturing", lambda device: True)
    args = samples()["top_k"]
    with kernels.use("cuda"):
        with pytest.warns(RuntimeWarning, match="inside a CUDA-graph capture"):
            assert torch.equal(torch.ops.vlmprune.top_k(*args), reference.top_k(*args))
        assert ctypes.c_int.in_dll(cuda_on_cpu, "loads").value == 0
        monkeypatch.setattr(cuda_ops, "capturing", lambda device: False)
        torch.ops.vlmprune.top_k(*args)
        monkeypatch.setattr(cuda_ops, "capturing", lambda device: True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.ops.vlmprune.top_k(*args)
    assert ctypes.c_int.in_dll(cuda_on_cpu, "loads").value == 1


@pytest.mark.parametrize("ranked", [False, True])
def test_a_long_sequence_is_chosen_from_once(cuda_on_cpu, ranked, monkeypatch):
    launched = []
    launch = cuda_ops.launch
    monkeypatch.setattr(cuda_ops, "launch", lambda name, *args: launched.append((name, args[1])) or launch(name, *args))
    columns, g = cuda_ops.CHOOSE_ONCE + 77, torch.Generator().manual_seed(0)
    given = gather_inputs(2, columns, 4, torch.float32, "cpu")
    real, scores = torch.rand(2, columns, generator=g) < 0.9, torch.randint(9, (2, columns), generator=g).float()
    counts = torch.tensor([300, 0]) if ranked else None
    args = (scores if ranked else scores > 7, counts, real, *given, 300 if ranked else columns, True)
    for mine, theirs in zip(cuda_ops.select_gather(*args), reference.select_gather(*args), strict=True):
        assert torch.equal(mine, theirs)
    assert launched == [("choose", 1024), ("select_gather", 256)]
    assert torch.equal(cuda_ops.top_k(scores, torch.tensor([5, 700]), real),
                       reference.top_k(scores, torch.tensor([5, 700]), real))  # fmt: skip


def test_what_a_launch_costs_the_host(cuda_on_cpu, monkeypatch):
    """Op, choice and launch together, without the kernel itself. The limit is wide: machines that test are busy."""

    class Driver:
        cuLaunchKernel = cuCtxSetCurrent = staticmethod(lambda *args: 0)

    args = samples()["select_gather"]
    with kernels.use("cuda"), torch.no_grad():
        kernels.call("select_gather", *args)
        monkeypatch.setattr(driver, "library", lambda: Driver)
        times = []
        for _ in range(200):
            begin = time.perf_counter()
            kernels.call("select_gather", *args)
            times.append(time.perf_counter() - begin)
    assert min(times) < 100e-6, f"{1e6 * min(times):.0f} us"
    assert ops.library is not None
