"""Compile every Triton kernel, as it is launched, for a GPU that need not be there; print what spills.

compile_triton.py PTXAS 80,90 fp32 bf16 [--few]
"""

import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vlmprune.kernels import triton_attention, triton_choose, triton_common, triton_greedy, triton_merge

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LONG = "counts first at entry rows begin end ids ids_out index_out dropped_out order".split()
INT = "twins best_key best_at".split()
BYTES = "candidates real mask_out picked keep".split()
FLOAT = "products scale basis value bias weight top total".split()


def kind_of(kernel, name, rows, out):
    """Type of an argument by its name; `rows` are pointers to a model's numbers, the rest that is not named an i32."""
    if name in rows:
        return f"*{rows[name]}"
    if name == "rows":
        return "*i64" if kernel is triton_merge.merge_kernel else "i32"
    if name == "scale" and kernel.__name__ in ("softmax_kernel", "mass_kernel"):
        return "fp32"
    if name == "out":
        return out
    for names, kind in ((LONG, "*i64"), (INT, "*i32"), (BYTES, "*u8"), (FLOAT, "*fp32")):
        if name in names:
            return kind
    return "i32"


def compile_for(ptxas, arch, kernel, rows, constants, out="*fp32"):
    options = {"num_warps": constants.pop("num_warps", 4)}
    kinds = {n: "constexpr" if n in constants else kind_of(kernel, n, rows, out) for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if kinds[n].startswith("*")}
    source = ASTSource(kernel, kinds, constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "k.ptx"
        path.write_text(made.asm["ptx"])
        command = [ptxas, "-v", f"-arch=sm_{arch}{'a' if arch >= 90 else ''}", path, "-o", path.with_suffix(".cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", said))
    print("spills", spilled, kernel.__name__, arch, rows, constants, flush=True)


def main() -> None:
    ptxas, archs, floats, few = (
        sys.argv[1],
        sys.argv[2].split(","),
        [a for a in sys.argv[3:] if a in DTYPES],
        "--few" in sys.argv,
    )
    for arch in archs:
        everything(partial(compile_for, ptxas, int(arch)), floats, few)


def everything(go, floats, few):
    """Compile all, or with `few` the largest."""
    for kind in floats:
        for dim in (128,) if few else (64, 128, 256):  # 72 is padded to 128
            for causal in (True,) if few else (False, True):
                size = triton_attention.tiles(100, dim, DTYPES[kind]) | {"CAUSAL": causal, "WIDE": False}
                for kernel in (triton_attention.softmax_kernel, triton_attention.mass_kernel):
                    go(kernel, {"query": kind, "key": kind}, dict(size))
        if few:
            continue
        go(triton_merge.merge_kernel, {"hidden": kind}, {"AT_ONCE": 8, "BLOCK": 512}, out=f"*{kind}")
        go(triton_greedy.hash_kernel, {"features": kind, "keys": "i64"}, {"ROWS": 16, "BLOCK": 128})
        step = {"LOW": 1e-5, "OBJECTIVE": "max_min", "GRAM": False, "BLOCK": 128, "PARTS": 256, "WIDE": 32}
        go(triton_greedy.greedy_step_kernel, {"source": kind}, step)
        for ranked in (True, False):
            rows = dict.fromkeys(("hidden", "cos", "sin", "hidden_out", "cos_out", "sin_out"), kind)
            rows["scores"] = "fp32" if ranked else "u8"
            size = {"RANK": ranked, "BLOCK": 4096, "WIDE": triton_choose.WIDE, "NARROW": triton_choose.NARROW}
            go(triton_choose.select_gather_kernel, rows, size | {"num_warps": triton_common.warps(4096)})
    for block in (4096,) if few else (1024, 4096, 16384):
        size = {"BLOCK": block, "num_warps": triton_common.warps(block)}
        if block <= triton_choose.TILE:
            go(triton_choose.top_k_kernel, {"scores": "fp32"}, size, out="*u8")
        else:
            tiled = {"TILE": triton_choose.TILE, "num_warps": triton_common.warps(triton_choose.TILE)}
            go(triton_choose.top_k_tiled_kernel, {"scores": "fp32"}, tiled, out="*u8")
        for objective in ("max_min",) if few else ("max_min", "max_sum", "log_det"):
            constants = {"LOW": 1e-5, "OBJECTIVE": objective}
            go(triton_greedy.greedy_kernel, {}, constants | triton_greedy.greedy_size(block))
    if not few:
        go(triton_greedy.twin_kernel, {"keys": "i64"}, {"ROWS": 64, "BLOCK": 128})
        step |= {"OBJECTIVE": "log_det", "GRAM": True, "PARTS": 128}
        go(triton_greedy.greedy_step_kernel, {"source": "fp32"}, step)


if __name__ == "__main__":
    main()
