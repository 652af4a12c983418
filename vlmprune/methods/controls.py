"""Controls, which look at nothing: what a method must beat. `downsample` is another one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from vlmprune.methods.base import BeforeLLM, Layout, Merge, Reduction, Seen, register
from vlmprune.parts import Seed, image_cells, laid_out, random_scores

__all__ = ["Grid", "Pool", "Random"]


@register("random")
@dataclass(frozen=True)
class Random(BeforeLLM):
    """Keep random patches.

    The choice depends on `seed`, the image's number in its prompt and its token count, and on nothing else: a batch row
    gets what the sample alone gets. Report the spread over several seeds.

    Args:
        seed: a whole number of at least 0.
    """

    summary = "random patches (control)"
    looks_at = "nothing"

    seed: Seed = 0

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        return self.best(random_scores(self.seed, layout), layout)


@register("grid")
@dataclass(frozen=True)
class Grid(BeforeLLM):
    """Keep the middle patch of every cell, of the largest grid of equal cells within the budget with its aspect.

    On an anyres image the thumbnail and the canvas of crops each get their share, of a video every frame. An image
    whose tokens were cut before is divided as if they were all there. Tables show the real count.
    """

    summary = "a regular grid of patches (control)"
    looks_at = "nothing"

    merges: ClassVar[bool] = False

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        cells = partial(image_cells, keep=self.budget)
        anchor, into, weight, counts = laid_out(layout, cells, ("cells", self.budget))
        merge = Merge(into, weight) if self.merges else None
        return self.kept(anchor, layout, counts if layout.whole else None, merge=merge)


@register("pool")
@dataclass(frozen=True)
class Pool(Grid):
    """Average every cell's patches into one token that stands at the cell's middle patch; cells are those of `grid`."""

    summary = "average pooling on a regular grid (control, merges)"
    merges = True

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        layout.need_whole("pool", "averages whole cells")
        return super().reduce(seen, layout)
