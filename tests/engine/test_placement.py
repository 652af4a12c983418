"""Which devices are one and the same."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vlmprune import UnsupportedError
from vlmprune.engine.placement import check_device


def check(planned, found):
    """`found` stands in for the device of a tensor: there need not be such a device."""
    layer = SimpleNamespace(_hf_hook=SimpleNamespace(execution_device=planned))
    check_device(layer, SimpleNamespace(device=torch.device(found)))


@pytest.mark.parametrize(
    ("planned", "found"),
    [("cuda", "cuda:0"), ("cuda:0", "cuda"), ("cuda", "cuda:1"), ("cuda:1", "cuda:1"), ("cpu", "cpu"), (None, "cpu")],
)
def test_one_device(planned, found):
    """`cuda` is the device that is current, whose tensors say which that is."""
    check(planned, found)


@pytest.mark.parametrize(
    ("planned", "found"), [("cuda:0", "cuda:1"), ("cuda", "cpu"), ("cpu", "cuda:0"), ("meta", "cpu")]
)
def test_several_devices(planned, found):
    with pytest.raises(UnsupportedError, match=f"{found}, then {planned}"):
        check(planned, found)
