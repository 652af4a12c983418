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
    for made in tiny.SHARED:
        # to look for a patch through all modules of all models takes longer than most tests
        if any(part._forward_pre_hooks for part in (made, *made.children())):
            from vlmprune import unpatch

            unpatch(made)


@pytest.fixture
def tiny_model() -> Callable[..., nn.Module]:
    """`tiny_model(...)` as `tiny.model(...)`, built once a session; whatever a test did to it is undone."""
    return tiny.shared
