"""What all tests of features are run on."""

from __future__ import annotations

import pytest
from scenes import FAMILIES, Scene


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def scene(request: pytest.FixtureRequest) -> Scene:
    """A model of every family, with what it is shown."""
    return Scene(*request.param)
