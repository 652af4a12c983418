"""Dividing a picture into equal cells, on the host: from its layout alone."""

from __future__ import annotations

import math

import torch

from vlmprune.parts.budget import floored, share
from vlmprune.parts.layout import ImageGrid

__all__ = ["grid_shape", "image_cells"]


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
