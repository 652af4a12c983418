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


@pytest.fixture
def pictures(tmp_path):
    """A folder of four pictures in three formats, and a file that is none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed, (name, size) in enumerate(tiny_folders.PICTURES.items()):
        tiny_folders.noise_picture(*size, seed).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder
