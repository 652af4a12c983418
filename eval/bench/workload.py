"""The prompt that a benchmark runs: random text around one random picture, the same tokens for every method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlmprune.patches import Family, family_of
from vlmprune.verify.prompts import random_text

__all__ = ["Workload", "make_workload"]


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

    @property
    def vision(self) -> dict[str, Any]:
        """The arguments of the model's `get_image_features`."""
        return {k: v for k, v in self.inputs.items() if k in ("pixel_values", "image_sizes")}


def make_workload(model: nn.Module, batch: int, prompt_tokens: int, seed: int = 0) -> Workload:
    """Make the inputs of `batch` prompts with `prompt_tokens` text tokens each, half of them before the picture.

    The picture has the tower's own size, and twice that in both directions in families that cut it into crops (a
    thumbnail and four crops in LLaVA-NeXT).
    """
    family = family_of(model)
    inner = family.inner(model)
    tile = inner.config.vision_config.image_size
    size = (2 * tile, 2 * tile) if family.views else (tile, tile)
    views, _ = family.grid(inner, size)
    grid = family.image_grid(inner, size)
    generator = torch.Generator().manual_seed(seed)
    text = random_text(family, inner, (batch, prompt_tokens), generator)
    start = prompt_tokens // 2
    holes = torch.full((batch, grid.tokens), family.token(inner))
    ids = torch.cat((text[:, :start], holes, text[:, start:]), 1)
    pixels = torch.randn(batch, *((views,) if family.views else ()), 3, tile, tile, generator=generator)
    device = model.device
    # no attention mask: `generate` drops one that is all ones
    inputs = {"input_ids": ids.to(device), "pixel_values": pixels.to(device, model.dtype)}
    if family.needs_sizes:
        inputs["image_sizes"] = torch.tensor([size] * batch, device=device)
    return Workload(model, family, inputs, batch, start, grid.tokens, grid.patches, views, ids.shape[1])
