"""The command in this process on a tiny model's folder."""

from __future__ import annotations

import pytest
import tiny_folders

from vlmprune.cli import main


@pytest.fixture(scope="session")
def llava(tmp_path_factory):
    """The folder of a tiny LLaVA."""
    return str(tiny_folders.save(tmp_path_factory.mktemp("models") / "llava"))


@pytest.fixture
def picture(tmp_path):
    """A picture file of 24 x 24 pixels."""
    path = tmp_path / "picture.png"
    tiny_folders.noise_picture(24, 24).save(path)
    return path


@pytest.fixture
def cli(capsys):
    """Run the command: (exit code, stdout, stderr); nobody ever sees a traceback."""

    def run(*argv):
        capsys.readouterr()
        code = main([str(part) for part in argv])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return run
