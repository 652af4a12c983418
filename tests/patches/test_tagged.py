"""A note stays on what a host makes of a tensor, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from vlmprune.patches.tagged import Tagged, tag, untag

WAYS = {
    "moved": lambda x: x.to("cpu", torch.float64),
    "cloned": lambda x: x.clone(memory_format=torch.contiguous_format),
    "repeated": lambda x: x.repeat_interleave(3, dim=0),
    "cut": lambda x: x[:, -2:],
    "joined": lambda x: torch.cat([torch.zeros(1, 3, 4), x]),
    "stacked": lambda x: torch.stack([x, x]),
    "split": lambda x: torch.split(x, [1, 1])[1],
    "iterated": lambda x: next(iter(x[None])),
    "computed with": lambda x: x * 2 + 1,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_note_goes_along(way):
    plain, note = torch.randn(2, 3, 4), object()
    made, found = untag(way(tag(plain, note)))
    assert found is note
    assert type(made) is torch.Tensor
    assert torch.equal(made, way(plain))


def test_what_is_read_off_a_tensor_has_no_note():
    x = tag(torch.randn(2, 3, 4), "note")
    for read in (x > 0, x.long(), x.sum(), x[0, 0], x.shape, x.dtype, x.max(-1).indices, x.sum().item()):
        assert not isinstance(read, Tagged)


def test_storage_and_gradients_are_the_tensors_own():
    plain = torch.randn(2, 3, 4, requires_grad=True)
    x = plain * 1
    tagged = tag(x, "note")
    assert tagged.data_ptr() == x.data_ptr()
    untag(tagged * 3)[0].sum().backward()
    assert torch.equal(plain.grad, torch.full_like(plain, 3))
    assert type(x) is torch.Tensor
    assert untag(x) == (x, None)
    assert untag(None) == (None, None)
