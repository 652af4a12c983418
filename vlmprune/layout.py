"""Where every visual token of a batch comes from, read off the model's own packing.

A token's number is its offset among its image's placeholders, newlines counted. All tensors are `(images, tokens)`,
padded to the longest image; `valid` says which entries are real.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["ImageGrid", "Layout", "trace_packing", "upload"]


class cached_property:  # as in functools, whose own takes a lock that torch.compile cannot trace
    """A property computed once per object (every time inside a graph, where it costs nothing)."""

    def __init__(self, function: Callable[[Any], Any]):
        self.function, self.__doc__, self.name = function, function.__doc__, function.__name__

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        if torch.compiler.is_compiling():
            return self.function(instance)
        value = instance.__dict__[self.name] = self.function(instance)
        return value


def upload(values: Any, device: torch.device) -> torch.Tensor:
    """Bring host numbers to `device` without waiting for it (a plain `torch.tensor(..., device=)` waits)."""
    return torch.as_tensor(values).to(device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class ImageGrid:
    """Layout of one image, on the host; shared by all images of one size.

    Attributes:
        source: `(tokens,)` index of the patch in the image's tower output flattened over (view, patch); 0 at newlines.
        view: `(tokens,)` view of each token, 0 for the thumbnail (or the only view), 1.. for crops.
        row, col: `(tokens,)` place in the raster of the token's plane. A newline has the row it closes.
        newline: `(tokens,)` bool.
        planes: (rows, cols) of the thumbnail (or only view) and, where there are crops, of their stitched canvas.
        views: number of views.
        side: (rows, cols) of patches in one view.
        crops: (vertical, horizontal) number of crops; (0, 0) for a single view.
        memo: what methods work out from it alone, by a key of their own. torch.compile traces into functools' caches.
    """

    source: torch.Tensor
    view: torch.Tensor
    row: torch.Tensor
    col: torch.Tensor
    newline: torch.Tensor
    planes: tuple[tuple[int, int], ...]
    views: int
    side: tuple[int, int]
    crops: tuple[int, int]
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def tokens(self) -> int:
        """Visual tokens, newlines included."""
        return self.source.numel()

    @cached_property
    def patches_per_view(self) -> list[int]:
        """Patches of every view that the packing left in."""
        return torch.bincount(self.view[~self.newline], minlength=self.views).tolist()

    @property
    def patches(self) -> int:
        """Visual tokens without newlines."""
        return sum(self.patches_per_view)

    @property
    def newlines(self) -> int:
        """Newline tokens."""
        return self.tokens - self.patches


def trace_packing(pack, views: int, rows: int, cols: int, grid: tuple[int, int]) -> ImageGrid:
    """Read an image's layout off its family's packing function.

    Instead of features, coordinates go through `pack`: (canvas row, canvas column, is-thumbnail, is-newline).

    Args:
        pack: maps `(views, rows * cols, 4)` float coordinates and a `(4,)` newline vector to `(tokens, 4)`.
        views: views of the image, the thumbnail first where there are several.
        rows, cols: patch grid of one view.
        grid: (vertical, horizontal) number of crops; (1, 1) for a single view.
    """
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    coords = torch.zeros(views, rows * cols, 4, dtype=torch.float64)
    for view in range(views):
        # the thumbnail has a plane of its own; crop v - 1 lies in raster order on the canvas
        down, right = divmod(max(view - 1, 0), grid[1])
        coords[view, :, 0] = (r + down * rows).flatten()
        coords[view, :, 1] = (c + right * cols).flatten()
        coords[view, :, 2] = float(view == 0)
    packed = pack(coords, torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64))
    y, x = packed[:, 0].round().long(), packed[:, 1].round().long()
    newline, thumbnail = packed[:, 3] > 0.5, packed[:, 2] > 0.5
    crop = 1 + (y // rows) * grid[1] + x // cols
    view = torch.where(thumbnail, 0, crop)
    source = view * (rows * cols) + (y % rows) * cols + x % cols
    source[newline] = 0

    row, col, planes = y.clone(), x.clone(), []
    for plane in [thumbnail & ~newline, ~thumbnail & ~newline]:
        if plane.any():
            ys, row[plane] = torch.unique(y[plane], return_inverse=True)
            xs, col[plane] = torch.unique(x[plane], return_inverse=True)
            planes.append((ys.numel(), xs.numel()))
    # a newline closes the row of the token before it
    for i in newline.nonzero().flatten().tolist():
        row[i], col[i], view[i] = (row[i - 1], col[i - 1] + 1, view[i - 1]) if i else (0, 0, 0)
    crops = grid if views > 1 else (0, 0)
    return ImageGrid(source, view, row, col, newline, tuple(planes), views, (rows, cols), crops)


@dataclass(frozen=True, eq=False)
class Layout:
    """Every visual token of one batch.

    Attributes:
        grids: one per image, in prompt order.
        sample: the batch row of every image.
        ordinal: the image's number within its prompt.
        first_view: index of every image's first view in the tower's output batch.
        position: `(images, tokens)` column of the token in the unpruned prompt.
        alive: `(images, tokens)` bool, real tokens that earlier cuts have not dropped.
        alive_counts: number of alive tokens of every image, known on the host.
        alive_patches: the same without newlines; None after a cut that let newlines compete with patches.
        entered: `alive_counts` at the input of the first decoder layer, after the cuts there: what a fraction is of.
        entered_patches: the same for `alive_patches`.
        view_size: patches of one tower view (rows * cols), for `source`.
        soft: `(images, tokens)` weights where a cut only weakened tokens (training), and
        standing: `(images, tokens)` bool, what would be left had it removed them; both None otherwise.
    """

    grids: Sequence[ImageGrid]
    sample: list[int]
    ordinal: list[int]
    first_view: list[int]
    position: torch.Tensor
    alive: torch.Tensor
    alive_counts: list[int]
    alive_patches: list[int] | None
    entered: list[int]
    entered_patches: list[int] | None
    view_size: int
    soft: torch.Tensor | None = None
    standing: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.grids)

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.position.device

    @property
    def width(self) -> int:
        """Tokens of the longest image."""
        return self.position.shape[1]

    def stack(self, field: str, fill: int | bool = 0) -> torch.Tensor:
        """Pad one field of all grids to `(images, width)` on the layout's device."""
        if len({id(grid) for grid in self.grids}) == 1:
            return upload(getattr(self.grids[0], field), self.device).expand(len(self), -1)
        rows = [getattr(grid, field) for grid in self.grids]
        out = rows[0].new_full((len(rows), self.width), fill)
        for i, row in enumerate(rows):
            out[i, : row.numel()] = row
        return upload(out, self.device)

    @cached_property
    def newline(self) -> torch.Tensor:
        """`(images, tokens)` bool."""
        return self.stack("newline", False)

    @cached_property
    def view(self) -> torch.Tensor:
        """`(images, tokens)` long; the thumbnail (or only view) is 0."""
        return self.stack("view")

    @cached_property
    def row(self) -> torch.Tensor:
        """`(images, tokens)` long, raster row within the token's plane."""
        return self.stack("row")

    @cached_property
    def col(self) -> torch.Tensor:
        """`(images, tokens)` long, raster column within the token's plane."""
        return self.stack("col")

    @cached_property
    def patches(self) -> torch.Tensor:
        """`(images, tokens)` bool: alive and no newline."""
        return self.alive & ~self.newline

    @property
    def plane(self) -> torch.Tensor:
        """`(images, tokens)` long: 0 the thumbnail or only view, 1 the canvas of crops."""
        return (self.view > 0).long()

    def from_tower(self, values: torch.Tensor) -> torch.Tensor:
        """Bring `(views, patches)` or `(views, patches, dim)` tower values to `(images, tokens[, dim])`.

        Newlines and padding get an arbitrary patch's value: mask with `patches`.
        """
        start = upload(self.first_view, self.device)[:, None] * self.view_size
        index = self.stack("source") + start
        return values.flatten(0, 1)[index]
