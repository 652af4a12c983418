"""The models that come with the package: where their files are, and which pictures they know."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["COLOURS", "EVERY", "NAMES", "folder", "looks_drawn", "path"]

#: Saturated RGB colours; the background and its clutter are always muted, so colour marks an object.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (40, 168, 60),
    "blue": (48, 80, 220),
    "yellow": (232, 208, 44),
    "purple": (158, 52, 190),
    "cyan": (40, 196, 206),
}
#: The shipped models that answer questions.
NAMES: tuple[str, ...] = ("scene-llava", "scene-llava-next", "scene-qwen")
#: All that are shipped: scene-llava-long describes pictures at length.
EVERY: tuple[str, ...] = (*NAMES, "scene-llava-long")


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
        name: one of `EVERY`.

    Raises:
        ValueError: no such model; the message lists the names.
        FileNotFoundError: the model's weights are missing from this installation.
    """
    if name not in EVERY:
        raise ValueError(f"no embedded model {name!r}; there are {', '.join(EVERY)}")
    where = folder() / name
    if not (where / "config.json").exists():
        raise FileNotFoundError(f"the weights of {name} are missing from this installation ({where})")
    return where


def looks_drawn(image: Image.Image) -> bool:
    """Whether a picture may be a scene: what is saturated in it has, by and large, the colours of the objects.

    Of the shipped questions' pictures every one does (79 % of the saturated pixels at least), of photographs none seen
    (36 % at most); a picture without saturated pixels has no objects.
    """
    import numpy as np

    small = image.convert("RGB")
    small.thumbnail((512, 512))
    pixels = np.asarray(small, np.float32).reshape(-1, 3)
    pixels = pixels[np.ptp(pixels, axis=1) > 110]
    if not len(pixels):
        return False
    palette = np.array(list(COLOURS.values()), np.float32)
    near = np.square(pixels[:, None] - palette).sum(-1).min(1) < 55**2
    return bool(near.mean() > 0.6)
