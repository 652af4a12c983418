"""Finding every visual token of a prompt batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from vlmprune.engine.census import Census
from vlmprune.engine.channels import SIZES
from vlmprune.engine.plan import Plan
from vlmprune.errors import UnsupportedError
from vlmprune.parts.layout import ImageGrid, Layout, upload

__all__ = ["prompt_layout"]


@dataclass(frozen=True)
class Items:
    """The images, or the videos, of a batch: `sample`, `ordinal`, `grids` and `start` as in `Layout`.

    Attributes:
        position: `(items, tokens)` columns of the tokens in the prompt.
        sizes: tokens of every item.
        patches: all that the tower made.
    """

    grids: list[ImageGrid]
    sample: list[int]
    ordinal: list[int]
    start: list[int]
    position: torch.Tensor
    sizes: list[int]
    patches: int

    def then(self, others: Items) -> Items:
        """These, and others of the same batch behind them."""
        width = max(*self.sizes, *others.sizes)
        position = torch.cat([pad(each, (0, width - each.shape[1])) for each in (self.position, others.position)])
        before = [self.sample.count(row) for row in others.sample]
        return Items(
            grids=self.grids + others.grids,
            sample=self.sample + others.sample,
            ordinal=self.ordinal + [n + number for n, number in zip(before, others.ordinal, strict=True)],
            start=self.start + [self.patches + first for first in others.start],
            position=position,
            sizes=self.sizes + others.sizes,
            patches=self.patches + others.patches,
        )


def prompt_layout(plan: Plan, inner: nn.Module, census: Census, encoded: dict[str, Any]) -> Layout:
    """Find every visual token of a batch, images before videos.

    Args:
        encoded: for "image" and "video" the encoder's output, whose `pooler_output` lists `(tokens, dim)` per item.

    Raises:
        ValueError: placeholders and features do not match.
        UnsupportedError: features that this model's packing does not explain.
    """
    found = [find_items(plan, inner, modality, census, encoded[modality]) for modality in census.holes]
    items = reduce(Items.then, found)
    patches = [grid.patches for grid in items.grids]
    width, device = items.position.shape[1], items.position.device
    return Layout(
        grids=items.grids,
        sample=items.sample,
        ordinal=items.ordinal,
        start=items.start,
        position=items.position,
        alive=torch.arange(width, device=device) < upload(items.sizes, device)[:, None],
        alive_counts=items.sizes,
        alive_patches=patches,
        entered=items.sizes,
        entered_patches=patches,
    )


def find_items(plan: Plan, inner: nn.Module, modality: str, census: Census, features: Any) -> Items:
    """Find the images, or the videos, of a batch by their placeholders."""
    holes, placeholders = census.holes[modality], census.placeholders[modality]
    known = known_sizes(plan, modality, features)
    check_beams(plan, len(features.pooler_output), len(known), placeholders)
    try:
        if plan.family.runs:
            sizes, known = pictures(census.runs[modality], math.prod(plan.family.side(inner)), len(known), features)
        else:
            sizes = plan.family.items(inner, modality, features, known)
        sample, ordinal, offset = assign_images(placeholders, sizes, modality)
    except ValueError as error:
        none = "" if any(placeholders) else no_placeholder(plan.family.token(inner, modality), modality)
        raise ValueError(f"{error}{none} {processor_needs(plan, inner)}") from None
    origin = undo_beams(sample, len(placeholders), len(known))
    encoded = [plan.grid(inner, modality, size) for size in known]
    grids = [encoded[o] for o in origin]
    check_packing(modality, grids, sizes)
    device, most = holes.device, max(placeholders)
    # a stable sort brings the placeholders to the front of every row, in order
    columns = (~holes).to(torch.uint8).sort(dim=1, stable=True).indices[:, :most]
    number = (upload(offset, device)[:, None] + torch.arange(max(sizes), device=device)).clamp(max=most - 1)
    return Items(
        grids=grids,
        sample=sample,
        ordinal=ordinal,
        start=[sum(grid.encoded for grid in encoded[:o]) for o in origin],
        position=columns[upload(sample, device)].gather(1, number),
        sizes=sizes,
        patches=sum(grid.encoded for grid in encoded),
    )


def known_sizes(plan: Plan, modality: str, features: Any) -> list[Any]:
    """What the packing of every image or video depends on (None where on nothing), as it was noted or by their number.

    Raises:
        UnsupportedError: it was not noted.
    """
    if (noted := getattr(features, SIZES, None)) is not None:
        return noted
    if plan.family.sized(modality) or features.last_hidden_state is None:
        raise UnsupportedError(
            f"these {modality} features are not as the patched model computed them, and how many {modality}s there "
            "were (and their sizes) is unknown. `prefill_chunk_size` is not supported: it cuts the features into "
            "pieces."
        )
    return [None] * features.last_hidden_state.shape[0]


def check_beams(plan: Plan, made: int, known: int, placeholders: list[int]) -> None:
    """Refuse features that are repeated for beams, where the host mixes them up.

    Args:
        made: features of so many items.
        known: items that were encoded.
        placeholders: of every row.

    Raises:
        UnsupportedError: that.
    """
    if plan.family.alike and made not in (known, sum(map(bool, placeholders))):
        raise UnsupportedError(
            "beams, or several answers, to prompts with videos or several pictures are not supported: transformers "
            f"mixes up the features of {plan.family.model_type} models where it repeats them (unpruned, too). Search "
            "without beams, or ask about one picture."
        )


def no_placeholder(token: int, modality: str) -> str:
    """What to say where no prompt has a placeholder."""
    return (
        f" No prompt holds token {token}, the {modality} placeholder by the model's config "
        f"({modality}_token_id): is that the one the processor writes?"
    )


def pictures(runs: list[list[int]], view: int, views: int, features: Any) -> tuple[list[int], list[int]]:
    """Pictures that stand between texts, each of as many views as it has placeholders for.

    Args:
        runs: placeholders of every run, by row.
        view: tokens of one view.
        views: those that the tower saw.
        features: the encoder's output, with the views of every row once for each of its beams.

    Returns:
        Tokens of every picture of the prompts, and views of every picture that the tower saw.

    Raises:
        ValueError: a run that is no whole number of views, or more or less than there are.
    """
    sizes, made = list(chain(*runs)), sum(map(len, features.pooler_output))
    if odd := [run for run in sizes if run % view]:
        raise ValueError(f"a run of {odd[0]} image placeholders is no whole number of tiles of {view} tokens.")
    if made != sum(sizes) or not views or made % (views * view):
        raise ValueError(f"the prompts have {sum(sizes)} image placeholders, and {made} features were made for them.")
    beams = made // (views * view)
    return sizes, [run // view for run in chain(*runs[::beams])]


def check_packing(modality: str, grids: list[ImageGrid], sizes: list[int]) -> None:
    """Refuse features that their packing does not explain."""
    for i, (grid, tokens) in enumerate(zip(grids, sizes, strict=True)):
        if grid.tokens != tokens:
            raise UnsupportedError(
                f"{modality} {i} has {tokens} features where its packing gives {grid.tokens} tokens."
            )


def processor_needs(plan: Plan, inner: nn.Module) -> str:
    """Where placeholders come from, and why there may be too many or too few."""
    fields = plan.family.processor_fields(inner)
    needs = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    needs = f" For this model it needs {needs}." if fields else ""
    return (
        f"The processor writes the placeholders.{needs} A prompt that is cut off (truncation=True with max_length=...) "
        "loses some of them: leave truncation out, or raise max_length."
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
        given = f"{len(sizes)} {modality}s were" if len(sizes) != 1 else f"1 {modality} was"
        raise ValueError(
            f"{given} given, and the prompts have placeholders for {len(sample)} (to continue on a cache, give the new "
            f"{modality}s alone)."
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
