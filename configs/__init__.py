"""YAML files that ship with the package: runs, suites of tasks, and the template. Found by name from anywhere."""

from __future__ import annotations

from pathlib import Path

__all__ = ["HERE", "TEMPLATE", "find", "names"]

HERE = Path(__file__).resolve().parent
TEMPLATE = HERE / "template.yaml"


def names() -> list[str]:
    """What `find` knows: `demo.yaml`, `suites/common.yaml`, ..."""
    return sorted(path.relative_to(HERE).as_posix() for path in HERE.rglob("*.yaml"))


def find(name: str | Path, folder: str | Path = "") -> Path:
    """The file that a name means: one of the user's first, else one of ours; a file that may be missing if neither is.

    Args:
        name: a path, or the name of a file here: `demo`, `demo.yaml`, `configs/demo.yaml`, `suites/common.yaml`.
        folder: what a relative path is relative to.
    """
    path = Path(folder) / Path(name).expanduser()
    short = Path(name).as_posix().removeprefix("configs/")
    shipped = next((known for known in names() if short in (known, known.removesuffix(".yaml"))), None)
    return path if shipped is None or path.is_file() else HERE / shipped
