"""Compile vlmprune/kernels/csrc/*.cu to the PTX beside them, which the wheel ships and the driver loads.

    pip install --target /tmp/nvrtc nvidia-cuda-nvrtc-cu12==12.0.140
    python scripts/build_ptx.py /tmp/nvrtc/nvidia/cuda_nvrtc/lib/libnvrtc.so.12

CUDA 12.0 and compute_75, so that every driver that a supported torch runs on (525 and later) takes it, for Turing and
whatever came after. `--check` compares instead of writing. Run it after every change of a source: a test compares the
hashes.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from vlmprune.kernels.cuda_ops import PTX_OPTIONS, SOURCES, ptx_head

ENTRIES = {
    "nvrtcVersion": [ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_int)],
    "nvrtcCreateProgram": [ctypes.POINTER(ctypes.c_void_p), ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int,
                           ctypes.c_void_p, ctypes.c_void_p],
    "nvrtcCompileProgram": [ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)],
    "nvrtcGetProgramLogSize": [ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t)],
    "nvrtcGetProgramLog": [ctypes.c_void_p, ctypes.c_char_p],
    "nvrtcGetPTXSize": [ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t)],
    "nvrtcGetPTX": [ctypes.c_void_p, ctypes.c_char_p],
}  # fmt: skip


def main() -> int:
    """Compile every source; with --check, 1 if a PTX file is not what comes out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nvrtc", help="libnvrtc.so.12 of CUDA 12.0")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    nvrtc = ctypes.CDLL(args.nvrtc)
    for name, types in ENTRIES.items():
        getattr(nvrtc, name).argtypes = types
    stale = 0
    for source in sorted(SOURCES.glob("*.cu")):
        target, made = source.with_suffix(".ptx"), ptx_head(source) + compiled(nvrtc, source)
        same = target.exists() and target.read_text() == made
        if not args.check:
            target.write_text(made)
        stale += not same
        print(target.name, "is up to date" if same else "is stale" if args.check else "written")
    return int(args.check and stale > 0)


def compiled(nvrtc: ctypes.CDLL, source: Path) -> str:
    """PTX of one source."""

    def call(name: str, *args: object) -> None:
        status = getattr(nvrtc, name)(*args)
        if status and name != "nvrtcCompileProgram":
            raise RuntimeError(f"{name}: error {status}")

    def text(what: str) -> str:
        size = ctypes.c_size_t()
        call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        call(f"nvrtcGet{what}", program, buffer)
        return buffer.value.decode()

    major, minor = ctypes.c_int(), ctypes.c_int()
    call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
    if (major.value, minor.value) != (12, 0):
        raise SystemExit(f"this is NVRTC {major.value}.{minor.value}; PTX for old drivers needs 12.0 (see --help)")
    program = ctypes.c_void_p()
    call("nvrtcCreateProgram", ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None)
    options = (ctypes.c_char_p * len(PTX_OPTIONS))(*map(str.encode, PTX_OPTIONS))
    call("nvrtcCompileProgram", program, len(PTX_OPTIONS), options)
    log = text("ProgramLog").strip()
    if log:
        raise SystemExit(log)
    return text("PTX").lstrip("\n")


if __name__ == "__main__":
    sys.exit(main())
