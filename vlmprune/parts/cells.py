"""Where patches lie: a picture divided into equal cells, patches beside each other, and regions that they form."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from vlmprune.parts.budget import count, floored, share
from vlmprune.parts.layout import ImageGrid, Layout, upload

__all__ = ["adjacent", "grid_shape", "image_cells", "kept_of_regions", "laid_out", "neighbours", "nested_cells"]
__all__ += ["regions", "square_cells"]


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


def nested_cells(grid: ImageGrid, keep: int | float) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Divide every view of an image into squares of one size: the finest of a nested row that a budget pays for.

    The row of a view of 24 x 24 is 24, 12, 6, 3 and 1 squares a side: each is the one before divided by the next prime
    factor of the side, the smallest first (of what two unequal sides share, then by two, with smaller squares at the
    ends). Where the budget pays for none of them, the last.

    Returns:
        as `image_cells`, with the first patch of every square for its middle one.
    """
    token, patch = torch.arange(grid.tokens), ~grid.newline
    place = grid.source % math.prod(grid.side)
    row, col = place // grid.side[1], place % grid.side[1]
    size, rest = 1, math.gcd(*grid.side)
    while True:
        key = torch.where(patch, (grid.view * grid.side[0] + row // size) * grid.side[1] + col // size, -1)
        kinds, cell, sizes = key.unique(return_inverse=True, return_counts=True)
        total = int((kinds >= 0).sum())
        if total <= count(keep, grid.patches) or size >= max(grid.side):
            break
        factor = next((f for f in range(2, rest + 1) if rest % f == 0), 2)
        size, rest = size * factor, max(1, rest // factor)
    first = torch.full_like(sizes, grid.tokens).scatter_reduce(0, cell, token, "amin")[cell]
    return torch.where(patch, first, token), torch.where(patch, 1 / sizes[cell].double(), 1), total


def laid_out(
    layout: Layout, cells: Callable[[ImageGrid], tuple[torch.Tensor, torch.Tensor, int]], key: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
    """The cells of all images.

    Args:
        cells: `image_cells` or the like, asked once a grid.
        key: what else its answer hangs on.

    Returns:
        `(images, tokens)` bool, the patches that stand for cells; `(images, tokens)` long, into which every token
        flows, and float, its weight there; and the number of cells of every image.
    """
    into = torch.zeros(layout.position.shape, dtype=torch.long)
    weight, counts = torch.zeros(layout.position.shape, dtype=torch.float64), []
    for i, grid in enumerate(layout.grids):
        if key not in grid.memo:
            grid.memo[key] = cells(grid)
        into[i, : grid.tokens], weight[i, : grid.tokens], number = grid.memo[key]
        counts.append(number)
    weight = weight.float() if layout.device.type == "mps" else weight  # which has no float64
    into, weight = upload(into, layout.device), upload(weight, layout.device)
    anchor = (into == torch.arange(layout.width, device=layout.device)) & (weight > 0) & layout.patches
    return anchor, into, weight, counts


def square_cells(grid: ImageGrid, side: float) -> torch.Tensor:
    """`(tokens,)` long, the square of `side` patches, of its plane, that each token lies in."""
    across = max(math.ceil(cols / side) for _, cols in grid.planes)
    down = max(math.ceil(rows / side) for rows, _ in grid.planes)
    cell = (grid.plane * down + (grid.row / side).long()) * across + (grid.col / side).long()
    return torch.where(grid.newline, cell[~grid.newline].amin(), cell)  # newlines stand for nothing


def adjacent(grid: ImageGrid) -> torch.Tensor:
    """`(pairs, 2)` long: patches beside or below each other on their plane."""
    if "adjacent" not in grid.memo:
        pairs = []
        for plane, size in enumerate(grid.planes):
            here = ((grid.plane == plane) & ~grid.newline).nonzero().flatten()
            table = torch.full(size, -1)
            table[grid.row[here], grid.col[here]] = here
            pairs += [(table[:, :-1], table[:, 1:]), (table[:-1], table[1:])]
        edges = torch.cat([torch.stack((one.flatten(), other.flatten()), 1) for one, other in pairs])
        grid.memo["adjacent"] = edges[(edges >= 0).all(1)]
    return grid.memo["adjacent"]


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
            evenly spaced ones of those as large as the last.
            None takes `ratio`.
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


def neighbours(marked: torch.Tensor, layout: Layout, wrap: bool = False) -> torch.Tensor:
    """The patches left, right, above and below of marked ones, both `(images, tokens)` bool.

    Args:
        wrap: as the released code, numbers of patches within a view (+-1, +-side, clamped), instead of places.
    """
    if wrap:
        side = upload([grid.side for grid in layout.grids], marked.device)
        place, down, size = layout.stack("source"), side[:, 1:], max(grid.encoded for grid in layout.grids)
        patches = side.prod(1, keepdim=True)
        low = place // patches * patches
        high = low + patches - 1
    else:  # on the token's own plane, with a margin of one around it
        planes = max(len(grid.planes) for grid in layout.grids)
        rows, down = (max(plane[axis] for grid in layout.grids for plane in grid.planes) + 2 for axis in (0, 1))
        place, size = (layout.plane * rows + layout.row + 1) * down + layout.col + 1, planes * rows * down
        place = place.clamp(max=size - 1)  # newlines of a canvas without patches stand outside of it
        low, high = place * 0, place * 0 + size - 1
    hits = torch.zeros(len(layout), size, dtype=torch.long, device=marked.device)
    for step in (-1, 1, -down, down):
        hits = hits.scatter_add(1, (place + step).clamp(low, high), marked.long())
    return (hits.gather(1, place) > 0) & layout.patches


def middle(group: torch.Tensor, groups: int) -> torch.Tensor:
    """`(groups,)` middle index of every run of equal numbers in ascending `group`."""
    size = torch.bincount(group, minlength=groups)
    return size.cumsum(0) - size + (size - 1) // 2
