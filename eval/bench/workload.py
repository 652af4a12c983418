"""The prompt that a benchmark runs: random text around one random picture, the same tokens for every method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlmprune.patches import Family, family_of
from vlmprune.verify.prompts import joined, moved, pictures_of, random_text
from vlmprune.verify.runs import places_of

__all__ = ["Workload", "make_workload"]

SIDE = 24  # tokens along a side of the picture, where pictures have any size
TILES = 5  # of a picture that comes as tiles: two by two, and the thumbnail
PICTURE = ("pixel_values", "image_sizes", "image_grid_thw", "batch_num_images")


@dataclass(frozen=True)
class Workload:
    """A batch of prompts with one picture each, all equally long.

    Attributes:
        model: the model they are for.
        inputs: what the model's forward takes.
        batch: rows.
        start: column of every row's first visual token.
        visual: visual tokens of a row, newlines included.
        patches: the same without newlines.
        views: tower inputs of a picture.
        length: columns of a row.
        places: `(batch, length)` position ids, or `(axes, batch, length)`.
        end: position of the first token behind the prompt.
    """

    model: nn.Module
    family: Family
    inputs: dict[str, Any]
    batch: int
    start: int
    visual: int
    patches: int
    views: int
    length: int
    places: torch.Tensor
    end: int

    @property
    def vision(self) -> dict[str, Any]:
        """The arguments of the model's `get_image_features`."""
        return {k: v for k, v in self.inputs.items() if k in PICTURE}


def make_workload(model: nn.Module, batch: int, prompt_tokens: int, seed: int = 0) -> Workload:
    """Make the inputs of `batch` prompts with `prompt_tokens` text tokens each, half of them before the picture.

    The picture has the tower's own size, and twice that in both directions in families that cut it into crops or tiles
    (a thumbnail and four crops in LLaVA-NeXT). Where pictures have any size, it has 24 x 24 tokens.
    """
    family = family_of(model)
    inner = family.inner(model)
    generator = torch.Generator().manual_seed(seed)
    text = random_text(family, inner, (batch, prompt_tokens), generator)
    shown = [pictures_of(family, inner, [picture_size(family, inner)], generator) for _ in range(batch)]
    grids, start = shown[0][1][0], prompt_tokens // 2
    visual = sum(grid.tokens for grid in grids)
    ids = torch.cat((text[:, :start], torch.full((batch, visual), family.token(inner)), text[:, start:]), 1)
    given = {name: joined(name, [pictures[name] for pictures, _ in shown]) for name in shown[0][0]}
    # no attention mask: `generate` drops one that is all ones
    inputs = {"input_ids": ids} | given | family.said_of(inner, ids)
    places = places_of(family, inner, {name: x[:1] for name, x in inputs.items()})
    places = places[..., None, :].expand(*places.shape[:-1], batch, -1)
    if family.axes > 1:
        # as `generate` makes them in front of the model: a count of columns, and where tokens stand
        inputs["position_ids"] = torch.cat((torch.arange(ids.shape[1]).expand(1, batch, -1), places))
    return Workload(
        model,
        family,
        moved(model, inputs),
        batch,
        start,
        visual,
        sum(grid.patches for grid in grids),
        sum(grid.views for grid in grids),
        ids.shape[1],
        places.to(model.device),
        int(places.max()) + 1,
    )


def picture_size(family: Family, inner: nn.Module) -> tuple[int, int]:
    """(height, width) of the picture in pixels."""
    vision = inner.config.vision_config
    if family.packed:
        side = SIDE * vision.patch_size * getattr(vision, "spatial_merge_size", family.unit(inner))
        return side, side
    tile = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    if family.runs or family.listed:
        return tile, TILES * tile
    return (2 * tile, 2 * tile) if family.views else (tile, tile)
