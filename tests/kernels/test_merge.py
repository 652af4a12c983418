"""Merging, every implementation against Python loops."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import merge_inputs

merge = torch.ops.vlmprune.merge


def by_hand(hidden, at, alive, keep, into, weight, source):
    flat, out = hidden.double().flatten(0, 1), hidden.double().flatten(0, 1).clone()
    for i in range(len(at)):
        for t in range(at.shape[1]):
            if keep[i, t]:
                total = torch.zeros(flat.shape[1], dtype=torch.float64)
                for e in range(into.shape[1]):
                    s = e if source is None else int(source[i, e])
                    if into[i, e] == t and alive[i, s]:
                        total += float(weight[i, e]) * flat[at[i, s]]
                out[at[i, t]] = total
    return out.view_as(hidden)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_merge(implementation, device, dtype, sparse):
    for seed in range(3):
        given = merge_inputs(dtype, device, sparse, seed)
        before = given[0].clone()
        out = merge(*given)
        assert out.dtype == dtype
        assert torch.equal(given[0], before)
        expected = by_hand(*[x if x is None else x.cpu() for x in given])
        # one rounding of a float32 sum
        tolerance = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
        torch.testing.assert_close(out.cpu().double(), expected, atol=tolerance, rtol=tolerance)


def test_nothing_to_merge(implementation, device):
    given = merge_inputs(torch.float32, device)
    given[3] = torch.zeros_like(given[3])
    assert torch.equal(merge(*given), given[0])
    empty = [given[0], *[x[:, :0] for x in given[1:6]], None]
    assert torch.equal(merge(*empty), given[0])


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients(sparse):
    given = merge_inputs(torch.float64, sparse=sparse)
    given[0] = given[0].contiguous().requires_grad_()
    given[5] = given[5].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda hidden, weight: merge(hidden, *given[1:5], weight, given[6]),
                                    (given[0], given[5]))  # fmt: skip


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [("into", -1, "into is no token"), ("into", 8, "into is no token"), ("at", 39, "at is no row")],
)
def test_what_is_no_token_or_row(device, monkeypatch, name, wrong, message):
    """A GPU says so in a debug build (TRITON_DEBUG=1); without, what flows to no token would be left out."""
    if device.type == "cuda":
        pytest.skip("an assertion on a GPU ends its context")
    given, place = merge_inputs(torch.float32), {"at": 1, "into": 4}[name]
    given[place][1, 7] = wrong  # a token that is kept
    with pytest.raises((RuntimeError, IndexError)):
        merge(*given)
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    from vlmprune.kernels import triton_merge

    monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(debug=True))
    with pytest.raises(Exception, match=message):
        triton_merge.merge(*given)
