"""A tiny model's folder."""

from __future__ import annotations

import pytest
import tiny_folders


@pytest.fixture(scope="session")
def llava(tmp_path_factory):
    """The folder of a tiny LLaVA."""
    return str(tiny_folders.save(tmp_path_factory.mktemp("models") / "llava"))
