"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's own functions read it when triton is imported, so before all else

import tiny
from torch import nn

torch.set_num_threads(1)

pytest_plugins = ["commands", "support"]


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    """No test finds what another left on a shared model: leaving a block brings back what was there before."""
    yield
    if tiny.SHARED:
        from vlmprune import unpatch

        for made in tiny.SHARED:
            unpatch(made)


@pytest.fixture
def tiny_model() -> Callable[..., nn.Module]:
    """`tiny_model(...)` as `tiny.model(...)`, built once a session; whatever a test did to it is undone."""
    return tiny.shared
