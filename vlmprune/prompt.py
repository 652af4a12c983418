"""Finding every visual token of a prompt batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from vlmprune.errors import UnsupportedError
from vlmprune.finite import WAY_OUT, each_finite
from vlmprune.layout import ImageGrid, Layout, upload
from vlmprune.plan import Plan
from vlmprune.sequence import real_tokens
from vlmprune.tower import SEEN, SIZES

__all__ = ["prompt_layout"]


@dataclass(frozen=True)
class Items:
    """The images, or the videos, of a batch: `sample`, `ordinal`, `grids` and `first_view` as in `Layout`.

    Attributes:
        position: `(items, tokens)` columns of the tokens in the prompt.
        sizes: tokens of every item.
        views: all views that the tower saw.
    """

    grids: list[ImageGrid]
    sample: list[int]
    ordinal: list[int]
    first_view: list[int]
    position: torch.Tensor
    sizes: list[int]
    views: int


def prompt_layout(
    plan: Plan,
    inner: nn.Module,
    input_ids: torch.Tensor,
    mask: Any,
    encoded: dict[str, Any],
    guesses: int = 0,
    positions: torch.Tensor | None = None,
) -> tuple[Layout, torch.Tensor | None, list[int], tuple[torch.Tensor, int]]:
    """Find every visual token of a batch, with one host read (four or five counts per row, and what is sound).

    Args:
        input_ids: `(batch, length)`.
        mask: padding mask as the call brings it.
        encoded: for "image" and "video" the encoder's output, whose `pooler_output` lists `(tokens, dim)` per item.
        guesses: columns at the end that are no prompt: they do not count as tokens after the last visual one.
        positions: `(batch, length)` position ids of a call that brings no mask, or None.

    Returns:
        The layout, images before videos; the `(batch, length)` bool mask of real tokens (None if all are), per row the
        number of real tokens, and `(batch,)` the number of those after the last visual token with the largest of them.
        Inside a compiled graph the last two numbers of the host are upper bounds.

    Raises:
        ValueError: placeholders and features do not match, or features or taps of the tower that are not finite.
        UnsupportedError: features that this model's packing does not explain, several prompts packed into one row, or
            a mask that hides visual tokens.
    """
    length, device = input_ids.shape[1], input_ids.device
    holes = {modality: input_ids == plan.family.token(inner, modality) for modality in encoded}
    placeholder = torch.stack(list(holes.values())).any(0)
    real = real_tokens(mask, length)
    everything = torch.ones_like(placeholder) if real is None else real
    # real tokens behind the last placeholder: those that a sum from the right has not met a placeholder for
    after = everything & (placeholder.flip(1).cumsum(1).flip(1) == 0)
    text_after = after[:, : length - guesses].sum(1)
    given = numbers(encoded)
    sound = each_finite([values for _, _, values in given], device)
    # without a mask the host takes a jump in the positions for the start of another prompt
    one = torch.ones_like(sound[:0]) if positions is None else (positions.diff(dim=-1) == 1).all()[None]
    sound = torch.cat((sound, one))
    images = [len(image) for image in encoded["image"].pooler_output] if list(encoded) == ["image"] else []
    if torch.compiler.is_compiling() and images and len(input_ids) in (1, len(images)):
        # reading would break the graph: one prompt has all images and several have one each, or an error on the device;
        # padding is not counted, so it stays where it is, masked
        placeholders = images if len(input_ids) > 1 else [sum(images)]
        wanted, lengths, most_after = [placeholders], [length] * len(input_ids), length - min(placeholders)
        told = "compiled prompts with images need one image each, and as many placeholders as it has tokens."
        torch._assert_async((placeholder.sum(1) == upload(placeholders, device)).all(), told)
        told = f"image features or taps of the tower are not finite ({WAY_OUT}), or prompts are packed into one row."
        torch._assert_async(sound.all(), told)
        told = "the attention mask hides visual tokens: leave them out of the prompt instead."
        torch._assert_async((everything | ~placeholder).all(), told)
    else:
        unseen = placeholder & ~everything
        counts = torch.stack([x.sum(1) for x in (everything, *holes.values(), unseen)] + [text_after])
        read = torch.cat((counts.flatten(), sound.long())).tolist()
        rows, end = len(input_ids), counts.numel()
        if positions is not None and not read.pop():
            raise UnsupportedError(
                "position_ids that do not count up by one mean several prompts packed into one row, and a pruned call "
                "takes one prompt per row: give a padded batch with its attention_mask."
            )
        if strange := [part[:2] for part, good in zip(given, read[end:], strict=True) if not good]:
            what, which = strange[0]
            names = " and ".join(dict.fromkeys(repr(name) for name, _ in plan.cuts))
            raise ValueError(
                f"there are NaN or infinite numbers in {what} {which}: {names} cannot tell tokens apart. {WAY_OUT}."
            )
        lengths, *wanted, hidden, counts_after = [read[at : at + rows] for at in range(0, end, rows)]
        if any(hidden):
            row = next(row for row, count in enumerate(hidden) if count)
            raise UnsupportedError(
                f"attention_mask hides {hidden[row]} visual tokens of prompt {row}, which a cut would count as there: "
                "mask padding only, and leave pictures that are not to be seen out of the prompt."
            )
        most_after = max(counts_after)
        if all(n == length for n in lengths):
            real = None

    found = [
        find_items(plan, inner, modality, holes[modality], placeholders, encoded[modality])
        for modality, placeholders in zip(encoded, wanted, strict=True)
    ]
    sample, ordinal, first_view, seen, views = [], [], [], [0] * len(lengths), 0
    for items in found:
        sample += items.sample
        ordinal += [seen[row] + number for row, number in zip(items.sample, items.ordinal, strict=True)]
        first_view += [views + first for first in items.first_view]
        seen = [n + items.sample.count(row) for row, n in enumerate(seen)]
        views += items.views
    grids, sizes = [g for items in found for g in items.grids], [n for items in found for n in items.sizes]
    width, side = max(sizes), plan.family.side(inner)
    layout = Layout(
        grids=grids,
        sample=sample,
        ordinal=ordinal,
        first_view=first_view,
        position=torch.cat([pad(items.position, (0, width - items.position.shape[1])) for items in found]),
        alive=torch.arange(width, device=device) < upload(sizes, device)[:, None],
        alive_counts=sizes,
        alive_patches=[grid.patches for grid in grids],
        entered=sizes,
        entered_patches=[grid.patches for grid in grids],
        view_size=side * side,
    )
    return layout, real, lengths, (text_after, most_after)


def check_mask(mask: Any, cache: Any) -> None:
    """Refuse a mask of the caller's own making: from the first cut on, layers get a causal one over what is left.

    Ready 4-D masks are made by `generate` for static caches.

    Raises:
        UnsupportedError: any other mask than a 2-D one.
    """
    if mask is None or getattr(mask, "ndim", 4) == 2 or getattr(cache, "is_compileable", False):
        return
    raise UnsupportedError(
        "a pruned call with images takes a 2-D attention_mask of padding, (batch, length): another one (prefixes, "
        "packed prompts) does not fit the layers behind a cut. Use `with handle.disabled():` for the plain model."
    )


def numbers(encoded: dict[str, Any]) -> list[tuple[str, Any, torch.Tensor]]:
    """All that must be finite before a token is chosen: (what, which, values)."""
    found = []
    for modality, output in encoded.items():
        for i, features in enumerate(output.pooler_output):
            if isinstance(features, torch.Tensor) and features.numel():
                found.append((f"the features of {modality}", i, features))
        if (embeds := getattr(output, "embeds", None)) is not None:
            found.append(("the prompt's embeddings, which hold features of its", f"{modality}s", embeds))
        for tap, values in getattr(output, SEEN, {}).items():
            if values.is_floating_point():
                found.append((f"what is seen of the vision tower's {modality}s,", tap, values))
    return found


def find_items(
    plan: Plan, inner: nn.Module, modality: str, holes: torch.Tensor, placeholders: list[int], features: Any
) -> Items:
    """Find the images, or the videos, of a batch by their placeholders (`holes`: `(batch, length)` bool)."""
    sizes = [len(item) for item in features.pooler_output]
    sample, ordinal, offset = assign_images(placeholders, sizes, modality)
    known = getattr(features, SIZES, None)
    if known is None:
        if plan.family.needs_sizes or modality == "video" or features.last_hidden_state is None:
            raise UnsupportedError(
                f"these {modality} features are not as the patched model computed them, and how many {modality}s there "
                "were (and their sizes) is unknown. `prefill_chunk_size` is not supported: it cuts the features into "
                "pieces."
            )
        known = [None] * features.last_hidden_state.shape[0]
    origin = undo_beams(sample, len(placeholders), len(known))
    encoded = [plan.grid(inner, modality, size) for size in known]
    grids = [encoded[o] for o in origin]
    for i, (grid, tokens) in enumerate(zip(grids, sizes, strict=True)):
        if grid.tokens != tokens:
            raise UnsupportedError(
                f"{modality} {i} has {tokens} features where its packing gives {grid.tokens} tokens."
            )
    device, most = holes.device, max(placeholders)
    # a stable sort brings the placeholders to the front of every row, in order
    columns = (~holes).to(torch.uint8).sort(dim=1, stable=True).indices[:, :most]
    number = (upload(offset, device)[:, None] + torch.arange(max(sizes), device=device)).clamp(max=most - 1)
    return Items(
        grids=grids,
        sample=sample,
        ordinal=ordinal,
        first_view=[sum(grid.views for grid in encoded[:o]) for o in origin],
        position=columns[upload(sample, device)].gather(1, number),
        sizes=sizes,
        views=sum(grid.views for grid in encoded),
    )


def assign_images(
    placeholders: Sequence[int], sizes: Sequence[int], modality: str = "image"
) -> tuple[list[int], list[int], list[int]]:
    """Hand images (or videos) of `sizes` tokens to prompts with so many `placeholders`, in order.

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
            raise ValueError(
                f"prompt {row} has {wanted} {modality} placeholders and its {modality}s have {taken} tokens."
            )
    if len(sample) != len(sizes):
        raise ValueError(
            f"{len(sizes)} {modality}s were given, and the prompts have placeholders for {len(sample)} (to continue on "
            f"a cache, give the new {modality}s alone)."
        )
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
