"""Which compiled forms of the Triton kernels a model's calls need that warming up does not load; no GPU is needed.

Triton compiles a kernel anew for every dtype, every constant, and for numbers and addresses by whether 16 divides them.

loaded_triton.py bfloat16
"""

import sys
from itertools import product

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import create_function_from_signature

from vlmprune.kernels import (
    cases,
    choice,
    triton_attention,
    triton_choose,
    triton_greedy,
    triton_merge,
    triton_ops,
    warm,
)

BACKEND = CUDABackend(GPUTarget("cuda", 90, 32))
forms, binders = {}, {}


def start(device, kernel, grid, *args, **options):
    """Instead of a launch: note the form."""
    if kernel not in binders:
        binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
    _, form, _ = binders[kernel](*args, **options)
    named = tuple(zip((p.name for p in kernel.params), map(str, form), strict=False))
    forms.setdefault((kernel.__name__, named, options.get("num_warps")), label)


def part(x):
    """The same values, next to each other but at an odd address, as a part of something has."""
    wide = x.new_zeros(x.numel() + 1)
    wide[1:] = x.flatten()
    return wide[1:].view_as(x)


def calls(dtype):
    """Ops as models of several widths call them, by a label."""
    random = lambda *shape: torch.randn(*shape).to(dtype)  # noqa: E731
    for batch, odd in product((1, 2), (False, True)):
        at_odds = part if odd else lambda x: x
        whole = at_odds(torch.ones(batch, 600) > 0)
        real = whole if batch == 2 else None
        marked = at_odds(torch.rand(batch, 600) < 0.3)
        for axes, width in ((0, 896), (3, 3584)):
            shape = (axes,) * bool(axes) + (batch, 600)
            hidden, ids = random(batch, 600, width), at_odds(torch.arange(600).expand(shape).contiguous())
            cos, none = random(*shape, 128), hidden.new_empty(*shape, 0)
            for rotary, close in ((cos, False), (none, True)):
                yield "select_gather", (marked, None, real, hidden, ids, rotary, rotary, 300, close)
        for tokens in (576, 2880, 5000):
            scores, among = at_odds(torch.randn(batch, tokens)), torch.ones(batch, tokens) > 0
            yield "top_k", (scores, torch.full((batch,), 64), among)
        for heads, dim, tokens in ((16, 64, 577), (16, 72, 729), (16, 80, 300)):
            query, key = (random(batch, tokens, heads, dim).transpose(1, 2) for _ in range(2))
            for rows in (tokens, 1):
                yield "attention_mass", (query[:, :, :rows], key, 0.1, None, None, 0, None, None)
        for heads, groups, dim in ((14, 2, 64), (8, 8, 96), (28, 4, 128), (8, 4, 256)):
            query, key = random(batch, heads, 600, dim), random(batch, groups, 600, dim)
            at, weight = torch.arange(600).expand(batch, -1), at_odds(torch.rand(batch, 600))
            for rows in (600, 21, 1):
                args = (query[:, :, -rows:], key, 0.1, at[:, -rows:], real, 0, weight[:, -rows:], None)
                yield "attention_mass", args
            yield "attention_mass", (query, key, 0.1, at, real, 0, None, torch.zeros(batch, 600))
        for tokens, keep in ((576, 64), (577, 192), (2880, 320)):
            first, counts = at_odds(torch.zeros(batch, dtype=torch.long)), torch.full((batch,), keep)
            among = at_odds(torch.ones(batch, tokens) > 0)
            for objective in ("max_min", "max_sum", "log_det"):
                yield "greedy", (random(batch, tokens, 128), first, counts, among, objective, keep)
        at, among = torch.arange(576).expand(batch, -1) + 5, torch.ones(batch, 576) > 0
        keep = among & (torch.rand(batch, 576) < 0.3)
        for width, source in product((896, 4096), (None, torch.zeros(batch, 576, dtype=torch.long))):
            weight = at_odds(torch.rand(batch, 576))
            yield "merge", (random(batch, 600, width), at, among, keep, torch.zeros_like(at), weight, source)


for module in (triton_attention, triton_choose, triton_greedy, triton_merge):
    module.start = start
dtype, label = getattr(torch, sys.argv[1]), "warming up"
for op in choice.OPS:
    for _, args in cases.CASES[op]():
        if warm.fits([x for x in args if isinstance(x, torch.Tensor)], dtype):
            getattr(triton_ops, op)(*args)
loaded = len(forms)
for op, args in calls(dtype):
    label = f"{op}: {[tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in args]}"
    getattr(triton_ops, op)(*args)
for (kernel, form, _), missing in list(forms.items())[loaded:]:
    print("missing:", kernel, "of", missing, form)
print("loaded:", loaded)
