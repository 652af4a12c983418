"""Finding every visual token of a prompt batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vlmprune.errors import UnsupportedError
from vlmprune.layout import Layout, upload
from vlmprune.plan import Plan
from vlmprune.sequence import real_tokens
from vlmprune.tower import SIZES

__all__ = ["prompt_layout"]


def prompt_layout(
    plan: Plan, inner: nn.Module, input_ids: torch.Tensor, mask: Any, features: Any
) -> tuple[Layout, torch.Tensor | None, list[int], tuple[torch.Tensor, int]]:
    """Find every visual token of a batch, with one host read (three counts per row).

    Args:
        input_ids: `(batch, length)`.
        mask: padding mask as the call brings it.
        features: the encoder's output, whose `pooler_output` lists `(tokens, dim)` per image.

    Returns:
        The layout, the `(batch, length)` bool mask of real tokens (None if all are), per row the number of real tokens,
        and `(batch,)` the number of those after the last visual token with the largest of them. Inside a compiled
        graph the last two numbers of the host are upper bounds.

    Raises:
        ValueError: placeholders and features do not match.
        UnsupportedError: features that this model's packing does not explain.
    """
    length = input_ids.shape[1]
    placeholder = input_ids == plan.family.image_token(inner)
    real = real_tokens(mask, length)
    everything = torch.ones_like(placeholder) if real is None else real
    # real tokens behind the last placeholder: those that a sum from the right has not met a placeholder for
    after = everything & (placeholder.flip(1).cumsum(1).flip(1) == 0)
    sizes, text_after = [len(image) for image in features.pooler_output], after.sum(1)
    if torch.compiler.is_compiling() and len(input_ids) in (1, len(sizes)):
        # reading would break the graph: one prompt has all images and several have one each, or an error on the device;
        # padding is not counted, so it stays where it is, masked
        placeholders = sizes if len(input_ids) > 1 else [sum(sizes)]
        lengths, most_after = [length] * len(input_ids), length - min(placeholders)
        told = "compiled prompts with images need one image each, and as many placeholders as it has tokens."
        torch._assert_async((placeholder.sum(1) == upload(placeholders, input_ids.device)).all(), told)
    else:
        placeholders, lengths, counts_after = torch.stack((placeholder.sum(1), everything.sum(1), text_after)).tolist()
        most_after = max(counts_after)
        if all(n == length for n in lengths):
            real = None
    sample, ordinal, offset = assign_images(placeholders, sizes)
    known = getattr(features, SIZES, None)
    if known is None:
        if plan.family.needs_sizes or features.last_hidden_state is None:
            raise UnsupportedError(
                "these image features are not as the patched model computed them, and how many images there were (and "
                "their sizes) is unknown. `prefill_chunk_size` is not supported: it cuts the features into pieces."
            )
        known = [None] * features.last_hidden_state.shape[0]
    origin = undo_beams(sample, len(placeholders), len(known))
    encoded = [plan.grid(inner, size) for size in known]
    grids = [encoded[o] for o in origin]
    for i, (grid, tokens) in enumerate(zip(grids, sizes, strict=True)):
        if grid.tokens != tokens:
            raise UnsupportedError(f"image {i} has {tokens} features where its packing gives {grid.tokens} tokens.")
    first_view = [sum(grid.views for grid in encoded[:o]) for o in origin]

    device, most = input_ids.device, max(placeholders)
    token = torch.arange(max(sizes), device=device)
    # a stable sort brings the placeholders to the front of every row, in order
    columns = (~placeholder).to(torch.uint8).sort(dim=1, stable=True).indices[:, :most]
    number = (upload(offset, device)[:, None] + token).clamp(max=most - 1)
    side = plan.family.side(inner)
    layout = Layout(
        grids=grids,
        sample=sample,
        ordinal=ordinal,
        first_view=first_view,
        position=columns[upload(sample, device)].gather(1, number),
        alive=token < upload(sizes, device)[:, None],
        alive_counts=sizes,
        alive_patches=[grid.patches for grid in grids],
        entered=sizes,
        entered_patches=[grid.patches for grid in grids],
        view_size=side * side,
    )
    return layout, real, lengths, (text_after, most_after)


def assign_images(placeholders: Sequence[int], sizes: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Hand images of `sizes` tokens to prompts with so many `placeholders`, in order.

    Returns:
        For every image its batch row, its number within the prompt and its offset among the prompt's placeholders.
    """
    sample, ordinal, offset = [], [], []
    for row, wanted in enumerate(placeholders):
        taken = number = 0
        while taken < wanted and len(sample) < len(sizes):
            size = sizes[len(sample)]
            sample.append(row)
            ordinal.append(number)
            offset.append(taken)
            taken, number = taken + size, number + 1
        if taken != wanted:
            raise ValueError(f"prompt {row} has {wanted} image placeholders and its images have {taken} tokens.")
    if len(sample) != len(sizes):
        raise ValueError(f"{len(sizes)} images were given, and the prompts have placeholders for {len(sample)}.")
    return sample, ordinal, offset


def undo_beams(sample: Sequence[int], batch: int, encoded: int) -> list[int]:
    """For every image its number when the tower saw it.

    `generate` repeats every prompt with all its images for its beams, after the tower ran once per image.
    """
    if encoded == 0 or len(sample) % encoded:
        raise ValueError(f"{len(sample)} image features cannot come from {encoded} encoded images.")
    beams, origin, base = len(sample) // encoded, [], 0
    for row in range(batch):
        images = sample.count(row)
        origin += range(base, base + images)
        base += images if row % beams == beams - 1 else 0
    return origin
