"""What all tests of features are run on."""

from __future__ import annotations

import pytest
from scenes import FAMILIES, FEW, Scene


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def scene(request: pytest.FixtureRequest) -> Scene:
    """A model of every family, with what it is shown."""
    return Scene(*request.param)


@pytest.fixture(params=FEW)
def family_scene(request: pytest.FixtureRequest) -> Scene:
    """As `scene`, every family once."""
    return Scene(*FAMILIES[request.param])
