"""Folders of tiny models and of pictures."""

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


@pytest.fixture
def pictures(tmp_path):
    """A folder of four pictures in three formats, and a file that is none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed, (name, size) in enumerate(tiny_folders.PICTURES.items()):
        tiny_folders.noise_picture(*size, seed).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder
