"""What a picture of a size that was not met before costs: host time in front of the language model, once a size."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from torch import nn

from vlmprune.engine.plan import Plan
from vlmprune.errors import UnsupportedError
from vlmprune.eval.bench.stats import spread
from vlmprune.patches import Family, family_of

__all__ = ["check_sizes", "draw", "measure_sizes"]

SIDES = (200, 1600)  # pixels


def draw(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """So many different random (height, width)."""
    generator, found = random.Random(seed), {}
    while len(found) < count:
        found[generator.randint(*SIDES), generator.randint(*SIDES)] = None
    return list(found)


def known(family: Family, inner: nn.Module, size: tuple[int, int]) -> tuple[int, ...]:
    """A (height, width) in pixels as the family's packing knows it: some count patches, an even number of them."""
    if family.axes == 1:
        return size
    vision = inner.config.vision_config
    step = vision.patch_size * vision.spatial_merge_size
    return 1, *(vision.spatial_merge_size * max(1, round(side / step)) for side in size)


def check_sizes(model: nn.Module) -> None:
    """Raise UnsupportedError for a family whose pictures all have one layout."""
    family = family_of(model)
    if not family.needs_sizes:
        raise UnsupportedError(f"all pictures of {family.model_type} models have one layout: no size is ever new.")


def measure_sizes(model: nn.Module, count: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """Find the layouts of pictures of `count` random sizes, each twice.

    Returns:
        "new_ms": of a new size, of which "packed_ms" are those that no earlier size packs alike and "alike_ms" the
        others (None where there are none); "known_ms": of the same sizes again; "sizes", "layouts": how many there are.

    Raises:
        UnsupportedError: a family whose pictures all have one layout.
    """
    check_sizes(model)
    family = family_of(model)
    inner = family.inner(model)
    # what comes with the first picture of all (imports, caches of the host) is no cost of a size
    first = known(family, inner, (SIDES[0] - 1, SIDES[1] + 1))
    Plan(family, family.facts(inner), []).grid(inner, "image", first)
    plan = Plan(family, family.facts(inner), [])
    took: dict[str, list[float]] = {"packed_ms": [], "alike_ms": [], "known_ms": []}
    sizes = [known(family, inner, size) for size in draw(count)]
    met: set[int] = set()
    grids = []  # all alive, so that no two have one identity
    for kind in ("new", "known_ms"):
        for size in sizes:
            start = clock()
            grid = plan.grid(inner, "image", size)
            seconds = clock() - start
            which = kind if kind == "known_ms" else "alike_ms" if id(grid) in met else "packed_ms"
            took[which].append(seconds)
            met.add(id(grid))
            grids.append(grid)
    return {
        "sizes": count,
        "layouts": len(took["packed_ms"]),
        "new_ms": spread(took["packed_ms"] + took["alike_ms"]),
        **{name: spread(seconds) if seconds else None for name, seconds in took.items()},
    }
