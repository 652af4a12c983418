"""ShowUI's UI-guided token selection (arXiv 2411.17465; code showlab/ShowUI), before the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from vlmprune.methods.base import BeforeLLM, Layout, ModelFacts, Positions, Reduction, Seen, register
from vlmprune.parts import (
    Pixels,
    Share,
    Weight,
    adjacent,
    count,
    download,
    kept_of_regions,
    need_views,
    regions,
    upcast,
    upload,
)

__all__ = ["ShowUI"]


@register("showui")
@dataclass(frozen=True)
class ShowUI(BeforeLLM):
    """Keep part of every flat region of a screenshot, and all that stands alone.

    Patches beside each other whose pixels differ by less than `difference` (L2 of the tower's normalised pixels) are
    one region. Of a region of c patches max(1, c - round(c * ratio)) stay, evenly spaced. The source skips decoder
    layers for what it leaves out, in training.

    Args:
        keep, average: None takes `ratio`, so that the picture decides how many stay. A budget is spent on one patch of
            every region first and then in proportion to what regions have left (ours).
        ratio: share of a region that goes (code: 0.5).
        difference: code: 1.
        positions: original (code).
    """

    summary = "part of every flat region of a screenshot"
    paper = "arXiv 2411.17465"
    needs = "pixels"
    looks_at = "features"
    syncs = 1
    optional = True
    sees = (Pixels(),)
    refuses: ClassVar[dict[str, str]] = {
        "layers": "skipping layers for some tokens puts them back afterwards: sequence and keys stay as long in all "
        "others, and nothing is saved there. The selection acts before the language model instead."
    }
    refuses_inputs: ClassVar[dict[str, str]] = {
        "video": "joins flat regions of a screenshot, and frames of a video are no screenshots",
        "shrunk": "compares the pixels of single patches, and packing blends several of them here",
    }

    ratio: Share = 0.5
    difference: Weight = 1.0
    positions: Positions = "original"

    def see(self, facts: ModelFacts) -> tuple[Pixels, ...]:
        need_views("showui", facts, "take another method", "looks at the pixels of equal views")
        return self.sees

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: `(images, tokens, pixels)` in, decision out."""
        layout.need_whole("showui", "joins regions")
        (pixels,) = seen.values()
        edges, flat = [adjacent(grid) for grid in layout.grids], []
        for mine, pairs in zip(pixels, edges, strict=True):
            one, other = (upcast(mine[upload(end, mine.device)]) for end in pairs.unbind(1))
            flat.append((one - other).norm(dim=-1) < self.difference)
        same = np.array(download(torch.cat(flat)), dtype=bool)
        keep, counts = np.zeros(layout.position.shape, dtype=bool), []
        for image, (grid, pairs) in enumerate(zip(layout.grids, edges, strict=True)):
            if "arrays" not in grid.memo:  # read once a size
                grid.memo["arrays"] = (~grid.newline).numpy(), pairs.numpy()
            patch, both = grid.memo["arrays"]
            label = regions(grid.tokens, both[same[: len(pairs)]])
            same, budget = same[len(pairs) :], None if self.budget is None else count(self.budget, grid.patches)
            keep[image, : grid.tokens][patch] = kept_of_regions(label[patch], float(self.ratio), budget)
            counts.append(int(keep[image].sum()))
        return self.kept(upload(torch.from_numpy(keep), pixels.device), layout, counts)
