"""Compile every Triton kernel for a GPU that need not be there, for example: compile_triton.py 90 fp32 fp16 bf16."""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vlmprune.kernels import triton_ops

INDICES = "counts first at entry rows begin end pick ids ids_out index_out dropped_out order".split()
BYTES = "candidates real out_mask picked keep mask_out".split()


def compile_for(target, kernel, names, constants, floats="bf16", wide=()):
    """`names` are the arguments that are pointers to `floats`; the rest is told by its name, an i32 if by nothing."""
    kinds = {}
    for name in kernel.arg_names:
        if name in constants:
            kinds[name] = "constexpr"
        elif name in names:
            kinds[name] = f"*{floats}"
        elif name in wide:
            kinds[name] = "*fp32"
        elif (name in INDICES and name != "rows") or (name == "rows" and kernel is triton_ops.merge_kernel):
            kinds[name] = "*i64"
        elif name in BYTES or (name == "out" and kernel is triton_ops.top_k_kernel):
            kinds[name] = "*u8"
        else:
            kinds[name] = "fp32" if name == "scale" and "products" not in kernel.arg_names else "i32"
    # at run time Triton also builds a variant in which numbers that are 1 are constants
    ones = {name: 1 for name, kind in kinds.items() if kind == "i32"}
    for fixed in ({}, ones):
        typed = kinds | dict.fromkeys(fixed, "constexpr")
        made = triton.compile(ASTSource(kernel, typed, constants | fixed), target=target, options={"num_warps": 8})
        assert len(made.asm["cubin"]) > 1000
    print(kernel.__name__, floats, {k: v for k, v in constants.items() if isinstance(v, (bool, str))}, "ok")


def main() -> None:
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    for floats in sys.argv[2:]:
        compile_for(target, triton_ops.top_k_kernel, ["scores"], {"BLOCK": 4096}, floats)
        for real in (True, False):
            flags = {"REAL": real, "CONTIGUOUS": not real, "ROWS": 4, "BLOCK": 4096, "WIDE": 2048, "NARROW": 128}
            rows = ["hidden", "cos", "sin", "hidden_out", "cos_out", "sin_out"]
            compile_for(target, triton_ops.select_gather_kernel, rows, flags, floats)
        flags = {"CAUSAL": True, "REAL": True, "BIAS": True, "WIDE": False, "DIM": 128, "ROWS": 64, "KEYS": 64}
        fp32 = ["bias", "weight", "top", "total", "out"]
        for kernel in (triton_ops.softmax_kernel, triton_ops.mass_kernel):
            compile_for(target, kernel, ["query", "key"], flags, floats, fp32)
            bare = flags | {"CAUSAL": False, "REAL": False, "BIAS": False, "ROWS": 16}
            compile_for(target, kernel, ["query", "key"], bare, floats, fp32)
        compile_for(target, triton_ops.merge_kernel, ["hidden", "out"], {"BLOCK": 1024}, floats, ["weight"])
    for objective in ("max_sum", "max_min", "log_det"):
        constants = {"LOW": 1e-5, "OBJECTIVE": objective, "BLOCK": 4096}
        compile_for(target, triton_ops.greedy_kernel, [], constants, "fp32", ["products", "scale", "basis"])


if __name__ == "__main__":
    main()
