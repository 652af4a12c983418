"""ShowUI's UI-guided token selection (arXiv 2411.17465; code showlab/ShowUI), before the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch

from vlmprune.methods.base import Pruner, register
from vlmprune.parts import (
    Cut,
    Decoder,
    ImageGrid,
    Layout,
    ModelFacts,
    Must,
    Pixels,
    Positions,
    Reduction,
    Seen,
    Share,
    UnsupportedError,
    count,
    download,
    is_number,
    keep_patches,
    upcast,
    upload,
)

__all__ = ["ShowUI", "kept_of_regions", "regions"]


def regions(tokens: int, edges: np.ndarray) -> np.ndarray:
    """Connected components: the smallest number in the component of each of so many tokens.

    Args:
        edges: `(edges, 2)` whole numbers, tokens that belong together.
    """
    label = np.arange(tokens)
    while True:
        pair, new = label[edges], label.copy()
        for end in pair.T:
            np.minimum.at(new, end, pair.min(1, initial=tokens))
        new = new[new][new]  # whoever joined a component follows it
        if np.array_equal(new, label):
            return label
        label = new


def kept_of_regions(label: np.ndarray, ratio: float, budget: int | None) -> np.ndarray:
    """`(tokens,)` bool: of every region of c tokens max(1, c - round(c * ratio)), evenly spaced.

    Args:
        label: `(tokens,)`, the region of every token.
        budget: tokens that stay at most, which sets the ratio; where there are more regions, the largest keep one each,
            evenly spaced ones of those as large as the last. None takes `ratio`.
    """
    _, region, sizes = np.unique(label, return_inverse=True, return_counts=True)
    if budget is None:
        left = np.maximum(1, sizes - np.round(sizes * ratio)).astype(int)
    elif budget <= len(sizes):
        least = np.sort(sizes)[-budget]
        left = (sizes > least).astype(int)
        # of those as large as the last, evenly spaced ones: where nothing is flat, all are
        alike = np.flatnonzero(sizes == least)
        left[alike[np.linspace(0, len(alike) - 1, budget - left.sum()).round().astype(int)]] = 1
    else:
        # tokens beyond the first of each region, in proportion to what there is, the largest remainders up
        most, extra = sizes - 1, budget - len(sizes)
        part = most * extra / max(1, most.sum())
        left = 1 + np.floor(part).astype(int)
        left[np.argsort(np.floor(part) - part, kind="stable")[: budget - left.sum()]] += 1
    order = np.argsort(region, kind="stable")
    rank = np.empty_like(region)
    rank[order] = np.arange(len(order)) - (sizes.cumsum() - sizes)[region[order]]
    wanted = left[region]
    step = np.maximum(1, (sizes[region] - 1) / np.maximum(1, wanted - 1))
    near = np.round(rank / step)
    return np.where(wanted > 1, (np.round(near * step) == rank) & (near < wanted), (rank == 0) & (wanted > 0))


def neighbours(grid: ImageGrid) -> torch.Tensor:
    """`(edges, 2)` long: patches beside or below each other on their plane."""
    number = {}
    for plane, (rows, cols) in enumerate(grid.planes):
        here = ((grid.plane == plane) & ~grid.newline).nonzero().flatten()
        table = torch.full((rows, cols), -1)
        table[grid.row[here], grid.col[here]] = here
        number[plane] = table
    pairs = [
        torch.stack((one.flatten(), other.flatten()), 1)
        for table in number.values()
        for one, other in ((table[:, :-1], table[:, 1:]), (table[:-1], table[1:]))
    ]
    edges = torch.cat(pairs)
    return edges[(edges >= 0).all(1)]


@register("showui")
@dataclass(frozen=True)
class ShowUI(Pruner):
    """Keep part of every flat region of a screenshot, and all that stands alone.

    Patches beside each other whose pixels differ by less than `difference` (L2 of the tower's normalised pixels) are
    one region. Of a region of c patches max(1, c - round(c * ratio)) stay, evenly spaced.

    Args:
        keep, average: None takes `ratio`, so that the picture decides how many stay. A budget is spent on one patch of
            every region first and then in proportion to what regions have left; where there are more regions than it
            pays for, the largest keep one each (ours).
        ratio: share of a region that goes (code: 0.5).
        difference: code: 1.
        positions: original (code).
        newlines: kept.

    The source skips decoder layers for what it leaves out, in training; cut before the LLM it costs about 6 points even
    with its own model.
    """

    summary = "part of every flat region of a screenshot"
    paper = "arXiv 2411.17465"
    needs = "pixels"
    looks_at = "features"
    syncs = 1
    optional = True
    refuses: ClassVar[dict[str, str]] = {
        "layers": "skipping layers for some tokens puts them back afterwards: sequence and keys stay as long in all "
        "others, and nothing is saved there. The selection acts before the language model instead."
    }
    refuses_inputs: ClassVar[dict[str, str]] = {
        "video": "joins flat regions of a screenshot, and frames of a video are no screenshots",
        "shrunk": "compares the pixels of single patches, and packing blends several of them here",
    }

    ratio: Share = 0.5
    difference: Annotated[float, Must("a number of at least 0", lambda x: is_number(x, 0, 1e9))] = 1.0
    positions: Positions = "original"

    def cuts(self, facts: ModelFacts) -> list[Cut]:
        if facts.packed:
            raise UnsupportedError(
                "showui looks at the pixels of equal views, and this tower packs pictures of any size into one "
                "sequence: take another method."
            )
        return [Cut(Decoder(0), (Pixels(),), self.reduce, self.positions)]

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: `(images, tokens, pixels)` in, decision out."""
        if layout.alive_patches != [grid.patches for grid in layout.grids]:
            raise UnsupportedError("showui joins regions, and an earlier cut has taken patches: put showui first.")
        (pixels,) = seen.values()
        edges, flat = [], []
        for image, grid in enumerate(layout.grids):
            if "neighbours" not in grid.memo:
                edge = neighbours(grid)
                grid.memo["neighbours"] = edge, edge.numpy(), (~grid.newline).numpy()
            edges.append(grid.memo["neighbours"])
            one, other = (upcast(pixels[image, upload(end, pixels.device)]) for end in edges[-1][0].unbind(1))
            flat.append((one - other).norm(dim=-1) < self.difference)
        same = np.array(download(torch.cat(flat)), dtype=bool)
        keep, counts = np.zeros(layout.position.shape, dtype=bool), []
        for image, (grid, (_, edge, patch)) in enumerate(zip(layout.grids, edges, strict=True)):
            label = regions(grid.tokens, edge[same[: len(edge)]])
            same, budget = same[len(edge) :], None if self.budget is None else count(self.budget, grid.patches)
            keep[image, : grid.tokens][patch] = kept_of_regions(label[patch], float(self.ratio), budget)
            counts.append(int(keep[image].sum()))
        return keep_patches(upload(torch.from_numpy(keep), pixels.device), layout, counts, self.newlines)
