"""The models that come with the package: where their files are."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

__all__ = ["NAMES", "folder", "path"]

#: The shipped models.
NAMES: tuple[str, ...] = ("scene-llava", "scene-llava-next")


def folder() -> Path:
    """The folder that holds the embedded models, and modules trained for them. Nothing of the evaluation is imported.

    Raises:
        FileNotFoundError: this installation has no evaluation, whose data they are.
    """
    spec = find_spec("vlmprune.eval")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the embedded models are missing from this installation (vlmprune/eval/testbed)")
    return Path(spec.origin).parent / "testbed"


def path(name: str) -> Path:
    """Folder of a shipped model, for `from_pretrained`.

    Args:
        name: one of `NAMES`.

    Raises:
        ValueError: no such model; the message lists the names.
        FileNotFoundError: the model's weights are missing from this installation.
    """
    if name not in NAMES:
        raise ValueError(f"no embedded model {name!r}; there are {', '.join(NAMES)}")
    where = folder() / name
    if not (where / "config.json").exists():
        raise FileNotFoundError(f"the weights of {name} are missing from this installation ({where})")
    return where
