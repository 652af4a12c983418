"""What chooses tokens multiplies in float32, whatever precision the user lets products be in."""

from __future__ import annotations

import pytest
import torch

from vlmprune.kernels import precision
from vlmprune.parts.attention import cls_logits, mean_logits
from vlmprune.parts.diversity import most_apart, weighted_det


def inputs():
    g = torch.Generator().manual_seed(0)
    # cosines that differ by less than eight bits tell apart
    features = torch.randn(1, 1, 32, generator=g) + 0.02 * torch.randn(3, 60, 32, generator=g)
    every = torch.ones(3, 60, dtype=torch.bool)
    query, key = torch.randn(2, 3, 4, 5, 16, generator=g)
    return {
        "most_apart": lambda: most_apart(features, every),
        "weighted_det": lambda: weighted_det(features, torch.rand(3, 60, generator=g.manual_seed(1)), 9, every),
        "mean_logits": lambda: mean_logits(query, key, 0.3),
        "cls_logits": lambda: cls_logits(query[:, :, 0], key, 0.3),
    }


@pytest.mark.parametrize("name", inputs())
def test_products_that_choose_are_float32(name, monkeypatch):
    run = inputs()[name]
    expected, matmul = run(), torch.Tensor.__matmul__

    def rounded(a, b):
        """What a matrix product may do with float32 then: eight bits of every factor."""
        return matmul(a.bfloat16().double(), b.bfloat16().double()).to(a.dtype)

    for place, attribute in ((torch, "matmul"), (torch.Tensor, "__matmul__")):
        monkeypatch.setattr(place, attribute, rounded)
    monkeypatch.setattr(torch, "einsum", lambda *args: pytest.fail("a product that cannot be watched"))
    found = run()
    assert not torch.allclose(found.double(), expected.double(), rtol=1e-5, atol=1e-5)  # what the user allows
    monkeypatch.setattr(precision, "relaxed", lambda x: True)
    torch.testing.assert_close(run(), expected, rtol=1e-5, atol=1e-5)
