"""Fixtures of tests that run the command in this process."""

from __future__ import annotations

import pytest
import tiny_folders

from vlmprune.cli import main


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
