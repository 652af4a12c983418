"""Float32 products that are float32, whatever precision the user lets products be in (TF32, bfloat16).

The user's setting is neither touched nor waited for: it is one for the process, it is inherited from other settings in
ways that cannot be put back, and other threads multiply meanwhile.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["product", "relaxed"]

SETTING = {"cuda": "cuda", "cpu": "mkldnn"}


def relaxed(x: Tensor) -> bool:
    """Whether products of `x` with others may be rounded to less than float32."""
    if x.dtype != torch.float32:
        return False
    ask = getattr(torch._C, "_get_fp32_precision_getter", None)  # torch 2.9
    if ask is not None:
        return ask(SETTING.get(x.device.type, "generic"), "matmul") in ("tf32", "bf16")
    return torch.get_float32_matmul_precision() != "highest"


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`, in float32 where they are.

    Where less is allowed, each factor is taken apart into three numbers of eight bits, which every setting multiplies
    exactly: their six largest products make up a float32 one. An infinity becomes a NaN then.
    """
    if not relaxed(a):
        return torch.matmul(a, b)
    (a, mid_a, low_a), (b, mid_b, low_b) = parts(a), parts(b)
    out = torch.matmul(low_a, b)
    for left, right in ((a, low_b), (mid_a, mid_b), (mid_a, b), (a, mid_b), (a, b)):  # smallest first
        out += torch.matmul(left, right)
    return out


def parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three float32 tensors whose sum is `x`, of numbers that bfloat16 holds."""
    high = x.bfloat16().float()
    rest = x - high
    mid = rest.bfloat16().float()
    return high, mid, rest - mid
