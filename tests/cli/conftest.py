"""Folders of tiny models."""

from __future__ import annotations

import pytest
import tiny_folders


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders of a LLaVA, a LLaVA-NeXT and a LLaVA with a SigLIP tower, by short names."""
    root = tmp_path_factory.mktemp("models")
    return {
        "llava": str(tiny_folders.save(root / "llava")),
        "next": str(tiny_folders.save(root / "next", "llava_next")),
        "siglip": str(tiny_folders.save(root / "siglip", tower="siglip")),
    }
