"""The layout of an image or video, read off its family's packing function: coordinates go through it, not features."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from vlmprune.errors import UnsupportedError
from vlmprune.parts.layout import ImageGrid

__all__ = ["noise", "trace_packing"]

ROUNDING = 1e-6  # what interpolation in float64 may be off, in patches


@lru_cache(maxsize=64)
def noise(views: int, patches: int) -> torch.Tensor:
    """`(views, patches, 1)` float64: numbers that tell every choice and every blend of patches from any other."""
    return torch.rand(views, patches, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def ranked(z: torch.Tensor) -> tuple[int, torch.Tensor]:
    """How many different numbers `(tokens,)` coordinates have, and the rank of each token's among them."""
    whole = z.long()
    if torch.equal(z, whole.to(z.dtype)):  # nothing was shrunk: counting is faster than sorting
        whole = whole - whole.min()
        there = (torch.bincount(whole) > 0).long()
        return int(there.sum()), (there.cumsum(0) - 1)[whole]
    values, rank = torch.unique((z / ROUNDING).round(), return_inverse=True)
    return len(values), rank


def coordinates(views: int, rows: int, cols: int, grid: tuple[int, int], apart: bool) -> torch.Tensor:
    """`(views, rows * cols, 5)` float64: canvas row, canvas column, plane, 0 and noise of every patch."""
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    coords = torch.zeros(views, rows * cols, 5, dtype=torch.float64)
    for view in range(views):
        # the thumbnail has a plane of its own; crop v - 1 lies in raster order on the canvas
        down, right = (0, 0) if apart else divmod(max(view - 1, 0), grid[1])
        coords[view, :, 0] = (r + down * rows).flatten()
        coords[view, :, 1] = (c + right * cols).flatten()
        coords[view, :, 2] = view if apart else float(view > 0)
    coords[..., 4:] = noise(views, rows * cols)
    return coords


def blend_of(
    centre: torch.Tensor, newline: torch.Tensor, number: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The `(tokens, 4)` patches between which every token lies, and their weights; None where tokens are patches.

    Args:
        centre: `(tokens, 2)` canvas coordinates.
        newline: `(tokens,)` bool.
        number: the patch at whole coordinates.
    """
    low = centre.floor().long()
    part = centre - low
    if not (part > 0)[~newline].any():
        return None
    corners = [torch.tensor([i, j]) for i in (0, 1) for j in (0, 1)]
    # a corner without weight may lie outside: take the one before it
    at = [low + corner * (part > 0) for corner in corners]
    parts = torch.stack([number(*place.unbind(1)) for place in at], 1)
    return parts, torch.stack([(part * t + (1 - part) * (1 - t)).prod(1) for t in corners], 1)


def rasters(
    centre: torch.Tensor, plane: torch.Tensor, newline: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, tuple[tuple[int, int], ...], tuple[tuple[float, float], ...]]:
    """Row and column of every token in its plane; lines of every plane in both directions, and how far apart."""
    row, col, planes, pitch = torch.zeros_like(plane), torch.zeros_like(plane), [], []
    for p in torch.unique(plane[~newline]).tolist():
        mine = (plane == p) & ~newline
        counts, steps = [], []
        for z, rank in ((centre[mine, 0], row), (centre[mine, 1], col)):
            lines, rank[mine] = ranked(z)
            counts.append(lines)
            steps.append(float(z.max() - z.min()) / (lines - 1) if lines > 1 else 0.0)
        planes.append((counts[0], counts[1]))
        # a single row or column has no neighbours: planes shrink in both directions about alike
        pitch.append((steps[0] or steps[1] or 1.0, steps[1] or steps[0] or 1.0))
    return row, col, tuple(planes), tuple(pitch)


def trace_packing(
    pack: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    views: int,
    rows: int,
    cols: int,
    grid: tuple[int, int],
    frames: int = 0,
    apart: bool = False,
) -> ImageGrid:
    """Read the layout of an image or video off its family's packing function.

    Instead of features, coordinates go through `pack`: (canvas row, canvas column, plane, is-newline). A token of
    another kind that opens a view, as [CLS] does, is the view's first patch plus twice the newline. Bilinear shrinking
    turns them into the coordinates between whose neighbours it blends, so these tell the weights too; a fifth channel
    of noise checks that they do.

    Args:
        pack: maps `(views, rows * cols, 5)` float coordinates and a `(5,)` newline vector to `(tokens, 5)`.
        views: views of the image, the thumbnail first where there are several; frames of a video.
        rows, cols: patch grid of one view.
        grid: (vertical, horizontal) number of crops; (1, 1) for a single view.
        frames: frames of a video, each a plane of its own; 0 for an image.
        apart: whether all views are alike, each a plane of its own, as those of a video are.

    Raises:
        UnsupportedError: a packing that mixes patches in another way.
    """
    apart = apart or frames > 0
    coords = coordinates(views, rows, cols, grid, apart)
    packed = pack(coords, torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64))
    newline, plane = packed[:, 3] > 0.5, packed[:, 2].round().long()
    whole = packed[:, :2].round()
    centre = torch.where((packed[:, :2] - whole).abs() < ROUNDING, whole, packed[:, :2])

    def number(y: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """View and index of the patch at whole canvas coordinates."""
        crop = 1 + (y // rows) * grid[1] + x // cols
        view = plane if apart else torch.where(plane == 0, 0, crop)
        return view, (view * (rows * cols) + (y % rows) * cols + x % cols).masked_fill(newline, 0)

    view, source = number(*whole.long().unbind(1))
    blend = blend_of(centre, newline, lambda y, x: number(y, x)[1])
    parts, weights = (source[:, None], torch.ones(1, 1, dtype=torch.float64)) if blend is None else blend
    explained = (coords[..., 4].flatten()[parts] * weights).sum(1)
    if ((explained - packed[:, 4]).abs() > ROUNDING)[~newline].any():
        raise UnsupportedError(
            "this model packs its patches in a way that is not understood (it is neither a choice of patches nor a "
            "bilinear shrinking): it cannot be pruned."
        )
    row, col, planes, pitch = rasters(centre, plane, newline)
    # a newline closes the row of the patch before it
    opens = packed[:, 3] > 1.5
    closes, token = newline & ~opens, torch.arange(len(newline))
    last = torch.where(closes, 0, token).cummax(0).values
    row, view, plane = (torch.where(closes, x[last], x) for x in (row, view, plane))
    col = torch.where(closes, col[last] + token - last, col)
    return ImageGrid(
        source=source,
        view=view,
        plane=plane,
        row=row,
        col=col,
        newline=newline,
        line=newline.cumsum(0) - closes.long(),
        planes=planes,
        views=views,
        side=(rows, cols),
        crops=grid if views > 1 and not apart else (0, 0),
        frames=frames,
        apart=apart,
        centre=centre,
        pitch=pitch,
        blend=blend,
    )
