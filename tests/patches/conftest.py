"""Models of the original llava package with their Hugging Face twins."""

from __future__ import annotations

import pytest

import vlmprune


@pytest.fixture(params=["llava", "llava_next"])
def family(request):
    return request.param


@pytest.fixture
def pair(family):
    """As `original.pair`; whatever a test did to them is undone."""
    import original  # not all tests here need the package

    models = original.pair(family)
    yield models
    for model in models:
        vlmprune.unpatch(model)
