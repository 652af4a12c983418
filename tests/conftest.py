"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import tiny
import torch
from torch import nn

torch.set_num_threads(1)


@pytest.fixture
def tiny_model() -> Iterator[Callable[..., nn.Module]]:
    """`tiny_model(...)` as `tiny.model(...)`, built once a session; whatever a test did to it is undone."""
    used = []

    def get(**options: object) -> nn.Module:
        made = tiny.shared(**options)
        used.append(made)
        return made

    yield get
    from vlmprune import unpatch

    for made in used:
        unpatch(made)
