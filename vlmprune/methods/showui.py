"""ShowUI's UI-guided token selection (arXiv 2411.17465; code showlab/ShowUI), before the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

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


def regions(tokens: int, edges: torch.Tensor) -> torch.Tensor:
    """Connected components: the smallest number in the component of each of so many tokens.

    Args:
        edges: `(edges, 2)` long, tokens that belong together.
    """
    label = torch.arange(tokens)
    while True:
        pair = label[edges]
        low = pair.amin(1, keepdim=True).expand_as(pair)
        new = label.scatter_reduce(0, pair.flatten(), low.flatten(), "amin")
        new = new[new][new]  # whoever joined a component follows it
        if torch.equal(new, label):
            return label
        label = new


def kept_of_regions(label: torch.Tensor, among: torch.Tensor, ratio: float, budget: int | None) -> torch.Tensor:
    """`(tokens,)` bool: of every region of c tokens max(1, c - round(c * ratio)), evenly spaced.

    Args:
        label: `(tokens,)` long, the region of every token; among: `(tokens,)` bool.
        budget: tokens that stay at most, which sets the ratio; where there are more regions, the largest keep one each.
            None takes `ratio`.
    """
    mine = among.nonzero().flatten()
    _, region, sizes = label[mine].unique(return_inverse=True, return_counts=True)

    def stay(share: float) -> torch.Tensor:
        return (sizes - (sizes * share).round().long()).clamp(min=1)

    if budget is None:
        left = stay(ratio)
    elif budget <= len(sizes):
        order = sizes.sort(descending=True, stable=True).indices[:budget]
        left = torch.zeros_like(sizes).index_fill(0, order, 1)
    else:
        # tokens beyond the first of each region, in turns that are proportional to its size
        extra = budget - len(sizes)
        most = sizes - 1
        part = (most * extra / most.sum().clamp(min=1)).double()
        left = part.floor().long()
        rest = (part - left).sort(descending=True, stable=True).indices[: extra - int(left.sum())]
        left = 1 + (left.index_add(0, rest, torch.ones_like(rest))).minimum(most)
    order = region.sort(stable=True).indices
    start = sizes.cumsum(0) - sizes
    rank = torch.empty_like(region).scatter(0, order, torch.arange(len(order)) - start[region[order]])
    size, wanted = sizes[region].double(), left[region].double()
    step = (size - 1) / (wanted - 1).clamp(min=1)
    near = (rank / step.clamp(min=1)).round()
    chosen = torch.where(wanted > 1, ((near * step).round() == rank) & (near < wanted), (rank == 0) & (wanted > 0))
    return torch.zeros_like(among).index_fill(0, mine[chosen], True)


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
        return [Cut(Decoder(0), (Pixels(),), self.reduce, self.positions)]

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: `(images, tokens, pixels)` in, decision out."""
        if layout.alive_patches != [grid.patches for grid in layout.grids]:
            raise UnsupportedError("showui joins regions, and an earlier cut has taken patches: put showui first.")
        (pixels,) = seen.values()
        edges, flat = [], []
        for image, grid in enumerate(layout.grids):
            if "neighbours" not in grid.memo:
                grid.memo["neighbours"] = neighbours(grid)
            edges.append(grid.memo["neighbours"])
            one, other = (upcast(pixels[image, upload(end, pixels.device)]) for end in edges[-1].unbind(1))
            flat.append((one - other).norm(dim=-1) < self.difference)
        same = torch.tensor(download(torch.cat(flat)), dtype=torch.bool).split([len(e) for e in edges])
        keep, counts = torch.zeros(layout.position.shape, dtype=torch.bool), []
        for image, grid in enumerate(layout.grids):
            label = regions(grid.tokens, edges[image][same[image]])
            budget = None if self.budget is None else count(self.budget, grid.patches)
            keep[image, : grid.tokens] = kept_of_regions(label, ~grid.newline, float(self.ratio), budget)
            counts.append(int(keep[image].sum()))
        return keep_patches(upload(keep, pixels.device), layout, counts, self.newlines)
