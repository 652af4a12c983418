"""Training views and supervised targets for the vision tower.

The tower sees more kinds of picture than the questions are about, so that one frozen tower serves both models:
whole sparse and crowded scenes, pictures full of objects (most supervision per second), single tiles cut out of
larger pictures, and larger pictures squeezed into one tile as the thumbnail of an any-resolution model is.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from vlmprune.eval.testbed.words import COLOUR_NAMES, VALUES

from .scenes import GRID, TILE, Scene, crowded_scene, loose_scene, patch_owner, quadrant_scene

__all__ = ["IGNORE", "tower_batch", "tower_view", "view_targets"]

IGNORE = -100
NO_COLOUR, NO_VALUE = len(COLOUR_NAMES), len(VALUES)


def view_targets(scene: Scene, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Patch and CLS targets of one 128 x 128 view of a scene.

    Args:
        scene: the scene the view shows (all of it or a part).
        owner: (128, 128) uint8, the view's part of the owner map.

    Returns:
        patches: (2, 256) int64, colour and value of each patch; NO_COLOUR / NO_VALUE on background.
        cls: (2, 4) int64, colour and value in each quadrant of the view; NO_* where it is empty, IGNORE where it
            holds several things.
    """
    owners = patch_owner(owner)
    colours = np.array([NO_COLOUR, *(COLOUR_NAMES.index(t.colour) for t in scene.things)])
    values = np.array([NO_VALUE, *(VALUES.index(t.value) for t in scene.things)])
    patches = np.stack([colours[owners], values[owners]])
    cls = np.empty((2, 4), np.int64)
    cls[0], cls[1] = NO_COLOUR, NO_VALUE
    seen = np.zeros(4, int)
    for i in np.unique(owners[owners > 0]):
        rows, columns = np.divmod(np.flatnonzero(owners == i), GRID)
        place = 2 * int(rows.mean() >= (GRID - 1) / 2) + int(columns.mean() >= (GRID - 1) / 2)
        seen[place] += 1
        cls[:, place] = (colours[i], values[i]) if seen[place] == 1 else IGNORE
    return patches, cls


def tower_view(rng: np.random.Generator, dense: float = 0.3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One training view: (128, 128, 3) uint8 pixels and its targets (see `view_targets`).

    Args:
        rng: source of all randomness.
        dense: share of views full of objects; the rest is mostly sparse scenes.
    """
    if rng.random() < dense:
        cells = int(rng.integers(4, 7))
        scene = loose_scene(rng, cells=cells, fill=rng.uniform(0.5, 0.9), size=(11, 128 // cells - 1))
        return scene.pixels, *view_targets(scene, scene.owner)
    kind = rng.random()
    if kind < 0.62:
        scene = quadrant_scene(rng, size=(16, 26))
    elif kind < 0.75:
        scene = crowded_scene(rng)
    else:
        width, height = ((256, 128), (128, 256))[rng.integers(2)]
        if kind < 0.9:
            scene = quadrant_scene(rng, size=(11, 18), width=width, height=height)
            left, top = (0, TILE)[rng.integers(2)] * (width > TILE), (0, TILE)[rng.integers(2)] * (height > TILE)
            owner = scene.owner[top : top + TILE, left : left + TILE]
            return scene.pixels[top : top + TILE, left : left + TILE], *view_targets(scene, owner)
        scene = quadrant_scene(rng, size=(11, 24), width=width, height=height)
        small = scene.image().resize((TILE, TILE), Image.Resampling.BICUBIC)
        owner = scene.owner[:: height // TILE, :: width // TILE]
        return np.asarray(small), *view_targets(scene, owner)
    return scene.pixels, *view_targets(scene, scene.owner)


def tower_batch(seed: int, size: int, dense: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A batch of views: pixels (B, 128, 128, 3) uint8, patches (B, 2, 256), cls (B, 2, 4)."""
    rng = np.random.default_rng(seed)
    views = [tower_view(rng, dense) for _ in range(size)]
    pixels, patches, cls = (np.stack(column) for column in zip(*views, strict=True))
    return pixels, patches, cls
