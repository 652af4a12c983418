"""Attention mass, every implementation against the whole softmax in float64."""

from __future__ import annotations

import pytest
import torch

attention_mass = torch.ops.vlmprune.attention_mass
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6}


def whole(query, key, scale, at, real, window, weight, bias):
    """Everything at once, in float64."""
    query, key = query.double().cpu(), key.double().cpu()
    batch, heads, rows, _ = query.shape
    keys = key.shape[2]
    logits = query @ key.repeat_interleave(heads // key.shape[1], 1).transpose(2, 3) * scale
    if bias is not None:
        logits = logits + bias.double()[:, None, None]
    visible = torch.ones(batch, rows, keys, dtype=torch.bool)
    if at is not None:
        visible &= torch.arange(keys) <= at[..., None]
        if window:
            visible &= torch.arange(keys) > at[..., None] - window
    if real is not None:
        visible &= real[:, None]
    blind = ~visible.any(-1, keepdim=True)
    share = logits.masked_fill(~(visible | blind)[:, None], -torch.inf).softmax(-1)
    share = torch.where(blind[:, None], 1 / keys, share).mean(1)
    weight = torch.full((batch, rows), 1 / max(rows, 1)).double() if weight is None else weight.double()
    return (share * weight[..., None]).sum(1)


MASKS = ("none", "causal", "window", "padding", "all")
SHAPES = ((1, 1, 3), (4, 2, 16), (6, 1, 20))  # heads, groups, width of a head
#: Every two of mask, shape and dtype meet; all three would take minutes in Triton's interpreter.
CASES = [(mask, shape, [*TOLERANCE][(i + k) % 3]) for i, mask in enumerate(MASKS) for k, shape in enumerate(SHAPES)]


@pytest.mark.parametrize(("masks", "shape", "dtype"), CASES, ids=str)
def test_against_the_whole_softmax(implementation, device, masks, shape, dtype):
    heads, groups, dim = shape
    g = torch.Generator().manual_seed(0)
    batch, rows, keys = 2, 70, 90
    # heads are split off a projection, so they are not contiguous
    query = torch.randn(batch, rows, heads * dim, generator=g).to(dtype).unflatten(-1, (heads, dim)).transpose(1, 2)
    key = torch.randn(batch, keys, groups * dim, generator=g).to(dtype).unflatten(-1, (groups, dim)).transpose(1, 2)
    at = real = weight = bias = None
    window = 0
    if masks != "none":
        at = torch.randint(0, keys, (batch, rows), generator=g)
        weight = torch.rand(batch, rows, generator=g).double()
    if masks in ("window", "all"):
        window = 7
    if masks in ("padding", "all"):
        real = torch.rand(batch, keys, generator=g) < 0.6
        real[:, 0] = False
    if masks == "all":
        bias = torch.randn(batch, keys, generator=g)
    args = [
        x if x is None or not isinstance(x, torch.Tensor) else x.to(device) for x in (at, real, window, weight, bias)
    ]
    mass = attention_mass(query.to(device), key.to(device), 0.3, *args)
    assert mass.dtype == torch.float32
    expected = whole(query, key, 0.3, at, real, window, weight, bias)
    torch.testing.assert_close(mass.cpu().double(), expected, atol=TOLERANCE[dtype] * max(1, rows / 8), rtol=1e-4)


@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 200), (3, 64), (0, 5), (5, 0)])
def test_edges(implementation, device, rows, keys):
    query, key = torch.randn(2, 4, rows, 8, device=device), torch.randn(2, 2, keys, 8, device=device)
    mass = attention_mass(query, key, 1.0, None, None, 0, None, None)
    assert mass.shape == (2, keys)
    if rows and keys:
        torch.testing.assert_close(mass.sum(1), torch.ones(2, device=device))
    at = torch.zeros(2, rows, dtype=torch.long, device=device)
    if rows and keys:  # causal at column 0: all of it goes there
        first = attention_mass(query, key, 1.0, at, None, 0, None, None)
        torch.testing.assert_close(first[:, 0], torch.ones(2, device=device))
        assert not first[:, 1:].any()


def test_rows_times_keys_never_exist():
    """Peak memory of many rows stays far under the scores'."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from vlmprune.kernels import reference

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.most = max(self.most, out.numel())
            return out

    query, key = torch.randn(1, 2, 2000, 4), torch.randn(1, 2, 2000, 4)
    at, real = torch.arange(2000)[None], torch.ones(1, 2000) > 0
    with Largest() as seen:
        reference.attention_mass(query, key, 1.0, at, real, 5, None, None)
    assert seen.most <= 2 * reference.CHUNK * 2000 < 2000 * 2000
