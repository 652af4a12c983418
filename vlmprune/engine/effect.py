"""Whether a budget did anything: an unpruned answer must not pass for a pruned one."""

from __future__ import annotations

import warnings

from vlmprune.engine.plan import Plan
from vlmprune.methods.base import Budgeted
from vlmprune.parts.budget import count
from vlmprune.parts.layout import Layout

__all__ = ["tell_idle"]


def tell_idle(plan: Plan, first: dict[str, Layout], last: dict[str, list[int]]) -> None:
    """Warn, once a patch and method, of an image that lost nothing although the method's budget is below its patches.

    Args:
        first: by method, the layout in front of its first cut in the language model.
        last: by method, the tokens of every image behind its last cut.
    """
    for method in plan.methods:
        name, budget = method.known_as, method.budget if isinstance(method, Budgeted) else None
        if budget is None or name in plan.told or name not in first:
            continue
        for image, patches in whole_images(first[name], last[name], budget)[:1]:
            plan.told.add(name)
            warnings.warn(
                f"{name} dropped nothing of image {image} although its budget, {budget}, is below the "
                f"{patches} patches there: on an image like this the method has no effect.",
                stacklevel=2,
            )


def whole_images(layout: Layout, left: list[int], budget: int | float) -> list[tuple[int, int]]:
    """The images that lost nothing although a budget is below their patches, and how many these are."""
    entered = layout.entered_patches or [grid.patches for grid in layout.grids]
    there = layout.alive_patches or entered
    kept = [before == after for before, after in zip(layout.alive_counts, left, strict=True)]
    return [(i, there[i]) for i, whole in enumerate(kept) if whole and count(budget, entered[i]) < there[i]]
