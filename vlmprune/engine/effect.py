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
        budget = method.budget if isinstance(method, Budgeted) else None
        if budget is None or method.known_as in plan.told or method.known_as not in first:
            continue
        layout = first[method.known_as]
        entered = layout.entered_patches or [grid.patches for grid in layout.grids]
        there = layout.alive_patches or entered
        for image, (before, after) in enumerate(zip(layout.alive_counts, last[method.known_as], strict=True)):
            if before == after and count(budget, entered[image]) < there[image]:
                plan.told.add(method.known_as)
                warnings.warn(
                    f"{method.known_as} dropped nothing of image {image} although its budget, {budget}, is below the "
                    f"{there[image]} patches there: on an image like this the method has no effect.",
                    stacklevel=2,
                )
                break
