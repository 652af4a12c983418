"""VFlowOpt (arXiv 2508.05211; code sihany077/VFlowOpt)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from operator import mul
from typing import Annotated, ClassVar

import torch

from vlmprune.methods.base import AnyCut, Layout, ModelFacts, Positions, Pruner, Reduction, Seen, register
from vlmprune.parts import (
    ContextRelevance,
    Must,
    Positive,
    Range,
    Scaled,
    Schedule,
    is_number,
    nearest,
    recycle,
    square_cells,
    upload,
)

__all__ = ["VFlowOpt"]

# of LLaVA-OneVision-7B, for a mean of 25, 50 and 10 % over all layers: what the three cuts leave of what they get, the
# threshold of the context and the side of a cell
RELEASED = (
    ((0.2651, 0.9833, 0.8773), 34.76, 15.58),
    ((0.7233, 0.7487, 0.487), 28.68, 11.76),
    ((0.1166, 1.0, 0.6011), 39.26, 17.39),
)
PART = Must("a number above 0 and at most 1", lambda part: is_number(part) and part > 0)


@register("vflowopt")
@dataclass(frozen=True)
class VFlowOpt(Pruner):
    """Keep the patches that the tower's context tokens look at, in three cuts, and recycle the others cell by cell.

    Context tokens receive far more attention in the tower than the mean patch. Before the LLM the best patches stay,
    and in each cell of a coarse grid the mean of all others, weighted by their scores (of videos none: code). At one
    and two thirds of the decoder the same scores cut again, so that no attention of the LLM is ever read.

    Args:
        keep, average: None runs the schedule released for an average of 25 %. Another value takes the released one (for
            25, 50 or 10 %) that is nearest and stretches what it removes; the papers' budgets are averages.
        threshold: t, how many times the mean a context token receives; None is that of the schedule.
        cell: side of a cell in patches, any number above 0; None is that of the schedule.
        second, third: what these cuts leave of what they get; None is that of the schedule. With one of them the first
            cut alone follows from the budget. `vlmprune tune --method vflowopt` searches all four, as the paper does.
        positions, newlines: original, kept (code).
    """

    summary = "the patches that the tower's context tokens look at, in three cuts; the rest recycled by cells"
    paper = "arXiv 2508.05211"
    needs = "tower attention (all rows)"
    looks_at = "tower"
    stage = "before the LLM + a third and two thirds of the decoder"
    optional = True
    refuses: ClassVar[dict[str, str]] = {
        "alpha": "every released configuration gives the entropy of a patch's pixels the weight 0."
    }

    # where the code searches, in its box for an average of 25 %
    threshold: Annotated[Positive | None, Range(1, 50)] = None
    cell: Annotated[Positive | None, Range(3, 24)] = None
    second: Annotated[float | None, PART, Range(0.5, 1)] = None
    third: Annotated[float | None, PART, Range(0.1, 1)] = None
    positions: Positions = "original"

    def schedules(self, layers: list[int], depth: int) -> list[Schedule]:
        """The released schedules on this decoder."""
        return [Schedule.at(layers, depth, tuple(accumulate(ratios, mul)), None, None) for ratios, *_ in RELEASED]

    def cuts(self, facts: ModelFacts) -> list[AnyCut]:
        depth = facts.decoder_layers
        layers = [0, depth // 3, 2 * (depth // 3)]
        if depth < 3:
            raise ValueError(f"vflowopt cuts at thirds of the decoder, and this one has {depth} layers.")
        made = self.schedules(layers, depth)
        chosen = nearest(made, self.keep, self.average, facts.view_patches or 576)
        released, threshold, side = RELEASED[chosen]
        schedule = replace(made[chosen], keep=self.keep, average=self.average)
        if self.second is not None or self.third is not None:
            own = (released[0], self.second or released[1], self.third or released[2])
            schedule = Scaled(tuple(accumulate(own, mul)), schedule.shares, self.keep, self.average)
        if isinstance(self.budget, float):
            schedule.left(10**9, 0)  # a fraction can be met for all images or for none
        see = (ContextRelevance(facts.attention_layer, self.threshold or threshold),)
        reduce = partial(self.reduce, schedule=schedule, side=self.cell or side)
        return self.in_stages(layers, lambda layer: see, reduce)

    def reduce(self, seen: Seen, layout: Layout, stage: int, schedule: Schedule, side: float) -> Reduction:
        """Pure: `(images, tokens)` context relevance in, decision out."""
        (scores,) = seen.values()
        left = [schedule.left(grid.patches, stage) for grid in layout.grids]
        if stage or not layout.whole:
            return self.best(scores, layout, left)
        cell, cells = torch.zeros(layout.position.shape, dtype=torch.long), []
        for i, (grid, n) in enumerate(zip(layout.grids, left, strict=True)):
            if ("vflowopt", side) not in grid.memo:
                grid.memo["vflowopt", side] = square_cells(grid, side).unique(return_inverse=True)
            kinds, cell[i, : grid.tokens] = grid.memo["vflowopt", side]
            cells.append(0 if grid.frames or n == grid.patches else len(kinds))
        keep, merge = recycle(scores, upload(cell, scores.device), layout.patches, left, cells)
        return self.kept(keep, layout, left, scores, merge if any(cells) else None)
