"""Controls: what a method must beat. They look at nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Literal

import torch

from vlmprune.errors import UnsupportedError
from vlmprune.methods.base import Budgeted, check_seed
from vlmprune.parts.budget import floored, share
from vlmprune.parts.cuts import Cut, Decoder, Merge, Pixels, Positions, Reduction
from vlmprune.parts.facts import ModelFacts
from vlmprune.parts.layout import ImageGrid, Layout, upload
from vlmprune.parts.selection import Newlines, check_choice, keep_patches, select
from vlmprune.registry import register

__all__ = ["Downsample", "Grid", "Pool", "Random", "grid_shape", "random_scores"]


def noise(seed: int, ordinal: int, tokens: int) -> torch.Tensor:
    """`(tokens,)` uniform scores, the same on every device and for every batch row."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + ordinal) % 2**63)
    return torch.rand(tokens, generator=generator)


#: What torch.compiler.assume_constant_result does to a function, without importing the compiler, which takes a second.
noise._dynamo_marked_constant = True

cached_noise = lru_cache(maxsize=256)(noise)


def random_scores(seed: int, layout: Layout) -> torch.Tensor:
    """`(images, tokens)` uniform scores that depend on the seed, the image's number in its prompt and its size."""
    scores = torch.zeros(layout.position.shape)
    draw = noise if torch.compiler.is_compiling() else cached_noise  # which a compiler would trace into
    for i, (grid, ordinal) in enumerate(zip(layout.grids, layout.ordinal, strict=True)):
        scores[i, : grid.tokens] = draw(seed, ordinal, grid.tokens)
    return upload(scores, layout.device)


@dataclass(frozen=True)
class Control(Budgeted):
    """Options that the controls share."""

    positions: Positions = "contiguous"
    newlines: Newlines = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("positions", self.positions, Positions)
        check_choice("newlines", self.newlines, Literal["all", "row", "none"])

    def cuts(self, facts: ModelFacts) -> list[Cut]:
        return [Cut(Decoder(0), (), self.reduce, self.positions)]

    def reduce(self, seen: dict, layout: Layout) -> Reduction:
        raise NotImplementedError


@register("random")
@dataclass(frozen=True)
class Random(Control):
    """Keep random patches.

    The choice depends on `seed`, the image's number in its prompt and its token count, and on nothing else: a batch row
    gets what the sample alone gets. Report the spread over several seeds.

    Args:
        keep, average: patches per image, or a fraction.
        seed: a whole number of at least 0.
        positions, newlines: as everywhere.
    """

    summary = "random patches (control)"

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)

    def reduce(self, seen: dict, layout: Layout) -> Reduction:
        return select(random_scores(self.seed, layout), self.budget, layout, self.newlines)


def grid_shape(keep: int, rows: int, cols: int) -> tuple[int, int]:
    """The largest (r, c) with r * c <= keep and the aspect of rows x cols, at least 1 x 1 and at most rows x cols."""
    if keep >= rows * cols:
        return rows, cols
    scale = math.sqrt(keep / (rows * cols))
    return max(1, min(keep, floored(rows * scale))), max(1, min(keep, floored(cols * scale)))


def image_cells(grid: ImageGrid, keep: int | float) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Divide every plane of an image into the grid of cells that its share of the budget pays for.

    Returns:
        `(tokens,)` long, the middle patch of the cell a patch lies in (newlines and unpaid planes point at themselves);
        `(tokens,)` float64, 1 / patches of the cell (1 at newlines, which stay what they are, 0 in unpaid planes); and
        the number of cells.
    """
    into, weight, total = torch.arange(grid.tokens), grid.newline.double(), 0
    shares = share(keep, [rows * cols for rows, cols in grid.planes])
    for plane, ((rows, cols), budget) in enumerate(zip(grid.planes, shares, strict=True)):
        if budget == 0:
            continue
        r, c = grid_shape(budget, rows, cols)
        mine = (grid.plane == plane) & ~grid.newline
        cell = (grid.row[mine] * r // rows) * c + grid.col[mine] * c // cols
        # every cell is a rectangle, so its middle patch in raster order of row and column means lies inside it
        middle_row = middle(torch.arange(rows) * r // rows, r)[cell // c]
        middle_col = middle(torch.arange(cols) * c // cols, c)[cell % c]
        number = torch.zeros(rows, cols, dtype=torch.long)
        number[grid.row[mine], grid.col[mine]] = into[mine]
        into[mine] = number[middle_row, middle_col]
        weight[mine] = 1 / torch.bincount(cell, minlength=r * c).double()[cell]
        total += r * c
    return into, weight, total


def middle(group: torch.Tensor, groups: int) -> torch.Tensor:
    """`(groups,)` middle index of every run of equal numbers in ascending `group`."""
    size = torch.bincount(group, minlength=groups)
    return size.cumsum(0) - size + (size - 1) // 2


@dataclass(frozen=True)
class Cells(Control):
    """A control that divides the picture into equal cells: the largest grid within the budget with its aspect.

    On an anyres image the thumbnail and the canvas of crops each get their share, of a video every frame. An image
    whose tokens were cut before is divided as if they were all there.
    """

    def image_cells(self, grid: ImageGrid) -> tuple[torch.Tensor, torch.Tensor, int]:
        """`image_cells` of this budget, worked out once per grid."""
        key = "cells", self.budget
        if key not in grid.memo:
            grid.memo[key] = image_cells(grid, self.budget)
        return grid.memo[key]

    def cells(self, layout: Layout) -> tuple[Reduction, torch.Tensor, torch.Tensor]:
        into = torch.zeros(layout.position.shape, dtype=torch.long)
        weight, counts = torch.zeros(layout.position.shape, dtype=torch.float64), []
        for i, grid in enumerate(layout.grids):
            into[i, : grid.tokens], weight[i, : grid.tokens], cells = self.image_cells(grid)
            counts.append(cells)
        weight = weight.float() if layout.device.type == "mps" else weight  # which has no float64
        into, weight = upload(into, layout.device), upload(weight, layout.device)
        anchor = (into == torch.arange(layout.width, device=layout.device)) & (weight > 0) & layout.patches
        whole = layout.alive_patches == [grid.patches for grid in layout.grids]
        return keep_patches(anchor, layout, counts if whole else None, self.newlines), into, weight


@register("grid")
@dataclass(frozen=True)
class Grid(Cells):
    """Keep the middle patch of every cell.

    Args:
        keep, average: at most so many patches per image (tables show the real count), or a fraction.
        positions, newlines: as everywhere.
    """

    summary = "a regular grid of patches (control)"

    def reduce(self, seen: dict, layout: Layout) -> Reduction:
        return self.cells(layout)[0]


@register("pool")
@dataclass(frozen=True)
class Pool(Cells):
    """Average every cell's patches into one token that stands at the cell's middle patch.

    Args:
        keep, average: at most so many tokens per image (tables show the real count), or a fraction.
        positions, newlines: as everywhere.
    """

    summary = "average pooling on a regular grid (control, merges)"

    def reduce(self, seen: dict, layout: Layout) -> Reduction:
        if layout.alive_patches != [grid.patches for grid in layout.grids]:
            raise UnsupportedError("pool averages whole cells, and an earlier cut has taken patches: put pool first.")
        reduction, into, weight = self.cells(layout)
        return replace(reduction, merge=Merge(into, weight))


@register("downsample")
@dataclass(frozen=True)
class Downsample(Budgeted):
    """Shrink the picture and enlarge it again: as many pixels as the budget has patches, but all the tokens.

    It saves nothing. It tells how much of a task needs detail at all, so it stands apart from methods in every table.

    Args:
        keep, average: fraction of the pixels (an int is taken of one view's patches).
    """

    summary = "the picture shrunk and enlarged again, all tokens (control, saves nothing)"
    stage = "pixels"

    def cuts(self, facts: ModelFacts) -> list[Cut]:
        budget = self.budget
        share = budget if isinstance(budget, float) else min(1.0, budget / facts.view_patches)
        return [] if share == 1 else [Cut(Pixels(), (), partial(self.shrink, share=share))]

    def shrink(self, pixels: torch.Tensor, share: float) -> torch.Tensor:
        """Pure: `(views, channels, height, width)` in and out, with `share` of the pixels' information."""
        resize = partial(torch.nn.functional.interpolate, mode="bilinear", antialias=True)
        small = [max(1, round(n * share**0.5)) for n in pixels.shape[-2:]]
        return resize(resize(pixels.float(), small), pixels.shape[-2:]).to(pixels.dtype)
