"""Where every visual token of a batch comes from, read off the model's own packing.

A token's number is its offset among its image's placeholders, newlines counted. All tensors are `(images, tokens)`,
padded to the longest image; `valid` says which entries are real.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vlmprune.errors import UnsupportedError
from vlmprune.parts.budget import share

__all__ = ["ImageGrid", "Layout", "Views", "download", "frames_of", "upload"]


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


def download(values: torch.Tensor) -> list:
    """The numbers of a tensor, which the host waits for; where torch.compile traces, always a break in the graph.

    With `capture_scalar_outputs` it would go on with symbols, and neither shapes nor errors can hang on these.
    """
    return torch.compiler.disable(torch.Tensor.tolist)(values) if torch.compiler.is_compiling() else values.tolist()


@dataclass(frozen=True, eq=False)
class ImageGrid:
    """Layout of one image or video, on the host; shared by all of one size.

    Attributes:
        source: `(tokens,)` index of the patch in the tower output flattened over (view, patch), the nearest one where a
            token blends several; 0 at newlines.
        view: `(tokens,)` view of each token: 0 for the thumbnail (or the only view), 1.. for crops; of a video its
            frame, 0.. in time. A token that blends patches of two crops belongs to the crop of its centre.
        plane: `(tokens,)` 0 for the thumbnail (or only view), 1 for the stitched canvas of crops; of a video its frame.
        row, col: `(tokens,)` place in the raster of the token's plane. A newline has the row it closes.
        newline: `(tokens,)` bool, tokens that are no patch: newlines, and [CLS] where it is a token of its own.
        line: `(tokens,)` what a newline closes, or opens: it and its patches have one number.
        planes: (rows, cols) of every plane.
        views: number of views.
        side: (rows, cols) of patches in one view of the tower.
        crops: (vertical, horizontal) number of crops; (0, 0) for a single view, and where views are alike.
        frames: frames of a video; 0 for an image.
        apart: whether all views are alike, each a plane of its own: frames, or tiles whose grid nobody tells.
        centre: `(tokens, 2)` float64 place of every token on its plane before un-padding and shrinking: (row, column)
            in patches, whole numbers where nothing was shrunk.
        pitch: patches between the centres of neighbours, down and across, by plane; 1 where nothing was shrunk.
        blend: where packing shrinks a plane: `(tokens, 4)` indices like `source` and their `(tokens, 4)` float64
            weights, which add up to 1; None where every token is one patch.
        memo: what methods work out from it alone, by a key of their own. torch.compile traces into functools' caches.
    """

    source: torch.Tensor
    view: torch.Tensor
    plane: torch.Tensor
    row: torch.Tensor
    col: torch.Tensor
    newline: torch.Tensor
    line: torch.Tensor
    planes: tuple[tuple[int, int], ...]
    views: int
    side: tuple[int, int]
    crops: tuple[int, int]
    frames: int
    apart: bool
    centre: torch.Tensor
    pitch: tuple[tuple[float, float], ...]
    blend: tuple[torch.Tensor, torch.Tensor] | None = None
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def tokens(self) -> int:
        """Visual tokens, newlines included."""
        return self.source.numel()

    @cached_property
    def patches_per_view(self) -> list[int]:
        """Patches of every view that the packing left in."""
        return torch.bincount(self.view[~self.newline], minlength=self.views).tolist()

    @cached_property
    def present(self) -> torch.Tensor:
        """`(views, patches)` bool, the patches of the tower that packing leaves in."""
        mask = torch.zeros(self.encoded, dtype=torch.bool)
        mask[self.source[~self.newline]] = True
        return mask.view(self.views, -1)

    @property
    def patches(self) -> int:
        """Visual tokens without newlines."""
        return sum(self.patches_per_view)

    @property
    def encoded(self) -> int:
        """Patches that the tower makes of it, those included that packing leaves out."""
        return self.views * self.side[0] * self.side[1]

    @property
    def newlines(self) -> int:
        """Newline tokens."""
        return self.tokens - self.patches

    @property
    def parts(self) -> torch.Tensor:
        """`(tokens, 4)` the patches that a token is made of; repeated where it is one."""
        return self.source[:, None].expand(-1, 4) if self.blend is None else self.blend[0]

    @property
    def weights(self) -> torch.Tensor:
        """`(tokens, 4)` float64, the weights of `parts`."""
        one = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
        return one.expand(self.tokens, -1) if self.blend is None else self.blend[1]


@dataclass(frozen=True, eq=False)
class Views:
    """The views of one batch as the tower sees them, before any prompt is known.

    Attributes:
        grids: one per image or video, in the order of their views.
    """

    grids: Sequence[ImageGrid]

    @cached_property
    def present(self) -> torch.Tensor:
        """`(views, patches)` bool, on the host: the patches that packing leaves in."""
        return torch.cat([grid.present for grid in self.grids])

    @property
    def patches(self) -> list[int]:
        """Patches of every view that packing leaves in."""
        return [n for grid in self.grids for n in grid.patches_per_view]

    def shares(self, keep: int | float) -> list[int]:
        """Patches that every view keeps of a budget per image (`budget.share`)."""
        return [n for grid in self.grids for n in share(keep, grid.patches_per_view)]


@dataclass(frozen=True, eq=False)
class Layout:
    """Every visual token of one batch.

    Attributes:
        grids: one per image, in prompt order; after all images, one per video.
        sample: the batch row of every image.
        ordinal: the image's number within its prompt; videos count on after the images.
        start: where every image's patches begin in the tower's output, flattened over views and patches.
        position: `(images, tokens)` column of the token in the unpruned prompt.
        alive: `(images, tokens)` bool, real tokens that earlier cuts have not dropped.
        alive_counts: number of alive tokens of every image, known on the host.
        alive_patches: the same without newlines; None after a cut that let newlines compete with patches.
        entered: `alive_counts` at the input of the first decoder layer, after the cuts there: what a fraction is of.
        entered_patches: the same for `alive_patches`.
        soft: `(images, tokens)` weights where a cut only weakened tokens (training), and
        standing: `(images, tokens)` bool, what would be left had it removed them; both None otherwise.
    """

    grids: Sequence[ImageGrid]
    sample: list[int]
    ordinal: list[int]
    start: list[int]
    position: torch.Tensor
    alive: torch.Tensor
    alive_counts: list[int]
    alive_patches: list[int] | None
    entered: list[int]
    entered_patches: list[int] | None
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

    @property
    def newlines(self) -> bool:
        """Whether any image has newlines."""
        return any(grid.newlines for grid in self.grids)

    @property
    def whole(self) -> bool:
        """Whether all patches are known to be there still."""
        return self.alive_patches == [grid.patches for grid in self.grids]

    def need_whole(self, name: str, does: str) -> None:
        """Raise UnsupportedError if an earlier cut took patches; `name` and what it `does` are the asking method's."""
        if not self.whole:
            raise UnsupportedError(f"{name} {does}, and an earlier cut has taken patches: put {name} first.")

    def stack(self, field: str, fill: int | bool = 0) -> torch.Tensor:
        """Pad one field of all grids to `(images, width)` on the layout's device."""
        if len({id(grid) for grid in self.grids}) == 1:
            only = getattr(self.grids[0], field)
            return upload(only, self.device).expand(len(self), *only.shape)
        rows = [getattr(grid, field) for grid in self.grids]
        out = rows[0].new_full((len(rows), self.width, *rows[0].shape[1:]), fill)
        for i, row in enumerate(rows):
            out[i, : len(row)] = row
        return upload(out, self.device)

    @cached_property
    def newline(self) -> torch.Tensor:
        """`(images, tokens)` bool."""
        return self.stack("newline", False)

    @cached_property
    def view(self) -> torch.Tensor:
        """`(images, tokens)` long; the thumbnail (or only view) is 0, of a video the frame."""
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

    @cached_property
    def plane(self) -> torch.Tensor:
        """`(images, tokens)` long: 0 the thumbnail or only view, 1 the canvas of crops; of a video its frame."""
        return self.stack("plane")

    def from_tower(self, values: torch.Tensor) -> torch.Tensor:
        """Bring `(views, patches)` or `(views, patches, dim)` tower values to `(images, tokens[, dim])`.

        Where packing shrinks a plane, a token's value is blended of its patches' values as its features are; whole
        numbers, which cannot be blended, are the nearest patch's. Newlines and padding get an arbitrary patch's value:
        mask with `patches`.
        """
        start = upload(self.start, self.device)[:, None]
        flat = values.flatten(0, 1)
        if all(grid.blend is None for grid in self.grids) or not values.is_floating_point():
            return flat[self.stack("source") + start]
        parts, weights = self.stack("parts") + start[..., None], self.stack("weights").to(values.dtype)
        return sum(
            flat[parts[..., i]] * weights[..., i].view(*parts.shape[:2], *[1] * (flat.ndim - 1)) for i in range(4)
        )


def frames_of(name: str, layout: Layout) -> list[torch.Tensor]:
    """Of every video `(frames, patches)` long: the tokens of its frames, in order.

    Args:
        name: of the method that asks, for the error.

    Raises:
        UnsupportedError: an earlier cut took patches, so that places of frames no longer correspond.
    """
    layout.need_whole(name, "compares whole frames")
    places = [(~grid.newline).nonzero().flatten().view(grid.frames, -1) for grid in layout.grids]
    return [upload(tokens, layout.device) for tokens in places]
