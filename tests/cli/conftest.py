"""Folders of tiny models, a picture, and the command run in this process."""

from __future__ import annotations

import pytest
import tiny_folders

from vlmprune.cli import main


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
def picture(tmp_path):
    """A picture file of 24 x 24 pixels."""
    path = tmp_path / "picture.png"
    tiny_folders.noise_picture(24, 24).save(path)
    return str(path)


@pytest.fixture
def cli(capsys):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*argv):
        capsys.readouterr()
        code = main([str(part) for part in argv])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return run
