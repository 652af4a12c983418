"""Counting what a batch of prompts is made of, with one host read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any

import torch
from torch import nn

from vlmprune.engine.channels import seen_on
from vlmprune.engine.finite import WAY_OUT, each_finite
from vlmprune.engine.plan import Plan
from vlmprune.engine.sequence import real_tokens
from vlmprune.errors import UnsupportedError
from vlmprune.parts.layout import download, upload

__all__ = ["Census", "check_mask", "count_prompts"]

HIDDEN = "leave pictures that are not to be seen out of the prompt"


@dataclass(frozen=True)
class Census:
    """What stands where in a batch of prompts. Inside a compiled graph the numbers of tokens are upper bounds.

    Attributes:
        holes: by modality `(batch, length)` bool, its placeholders.
        placeholders: by modality the number of them in every row.
        real: `(batch, length)` bool of real tokens, None if all are.
        lengths: real tokens of every row.
        text_after: `(batch,)` real tokens after the last visual one, and the largest of these numbers.
        text_before: the most real tokens that a row has before its first visual one.
        text_between: whether there may be text between the visual tokens of a row.
        runs: by modality, placeholders of every run of them, by row; where a family's pictures are runs.
    """

    holes: dict[str, torch.Tensor]
    placeholders: dict[str, list[int]]
    real: torch.Tensor | None
    lengths: list[int]
    text_after: tuple[torch.Tensor, int]
    text_before: int
    text_between: bool = True
    runs: dict[str, list[list[int]]] = field(default_factory=dict)


def count_prompts(
    plan: Plan,
    inner: nn.Module,
    input_ids: torch.Tensor,
    mask: Any,
    encoded: dict[str, Any],
    guesses: int = 0,
    positions: torch.Tensor | None = None,
    stand: Callable[[dict[str, torch.Tensor]], torch.Tensor] | None = None,
) -> Census:
    """Count real tokens and placeholders, a few counts per row, and see whether all is sound.

    Args:
        input_ids: `(batch, length)`.
        mask: padding mask as the call brings it.
        encoded: for "image" and "video" the encoder's output, whose `pooler_output` lists `(tokens, dim)` per item.
        guesses: columns at the end that are no prompt: they do not count as tokens after the last visual one.
        positions: `(batch, length)` position ids of a call that brings no mask, or None.
        stand: tells of `Census.holes`, as `()` bool, whether positions on several axes show where pictures stand.

    Raises:
        ValueError: features or taps of the tower that are not finite.
        UnsupportedError: several prompts packed into one row, a mask that hides visual tokens, or pictures that would
            be counted as text.
    """
    length = input_ids.shape[1]
    holes = {modality: input_ids == plan.family.token(inner, modality) for modality in encoded}
    placeholder = torch.stack(list(holes.values())).any(0)
    real = real_tokens(mask, length)
    everything = torch.ones_like(placeholder) if real is None else real
    text_after, text_before, between = text_around(everything, placeholder, guesses)
    given = numbers(encoded)
    finite = each_finite([values for _, _, values in given], input_ids.device)
    rows, yes = len(input_ids), finite.new_ones(())
    # without a mask the host takes a jump in the positions for the start of another prompt
    one = yes if positions is None else (positions.diff(dim=-1) == 1).all()
    stands = yes if stand is None else stand(holes).to(finite.device)
    if not plan.family.runs and (promised := placeholders_in_a_graph(encoded, rows)):
        demand_on_device(placeholder, everything, promised, finite.all() & one & stands)
        most = length - min(promised)
        # padding is not counted, so it stays where it is, masked
        return Census(holes, {"image": promised}, real, [length] * rows, (text_after, most), most)
    counts = torch.stack([everything, *holes.values(), placeholder & ~everything]).sum(-1)
    where = holes if plan.family.runs else {}
    told = torch.stack((text_before, one.long(), stands.long(), between.long()))
    columns = (found.flatten().long() for found in where.values())
    read = iter(download(torch.cat((*columns, counts.flatten(), text_after, finite.long(), told))))
    runs = {modality: runs_of([*islice(read, rows * length)], rows, length) for modality in where}
    lengths, *wanted, unseen, counts_after = ([*islice(read, rows)] for _ in range(len(counts) + 1))
    *good, most_before, single, standing, amid = read
    demand_sound(plan, bool(single), bool(standing), odd(given, good), unseen)
    real = None if min(lengths) == length else real
    wanted = dict(zip(encoded, wanted, strict=True))
    return Census(holes, wanted, real, lengths, (text_after, max(counts_after)), most_before, bool(amid), runs)


def text_around(
    everything: torch.Tensor, placeholder: torch.Tensor, guesses: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Real tokens of every row behind its last placeholder, the most before a first one, and whether some are between.

    Args:
        everything, placeholder: `(batch, length)` bool, real tokens and placeholders.
        guesses: columns at the end that do not count.
    """
    met = placeholder.cumsum(1)
    # those that a sum from the right has not met a placeholder for
    after = everything & (placeholder.flip(1).cumsum(1).flip(1) == 0)
    between = everything & ~placeholder & ~after & (met > 0)
    counted = after[:, : after.shape[1] - guesses]
    return counted.sum(1), (everything & (met == 0)).sum(1).amax(), between.any()


def odd(given: Sequence[tuple], good: Sequence[int]) -> list[tuple[str, Any]]:
    """(what, which) of the `numbers` that are not finite."""
    return [part[:2] for part, fine in zip(given, good, strict=True) if not fine]


def placeholders_in_a_graph(encoded: dict[str, Any], rows: int) -> list[int]:
    """How many placeholders every row must have inside a compiled graph, which reading would break; else nothing.

    One prompt has all images and several have one each, or there is an error on the device.
    """
    if not torch.compiler.is_compiling() or list(encoded) != ["image"]:
        return []
    images = [len(image) for image in encoded["image"].pooler_output]
    if rows == 1:
        return [sum(images)] if images else []
    return images if len(images) == rows else []


def runs_of(holes: list[int], rows: int, length: int) -> list[list[int]]:
    """The lengths of the runs of ones in each of so many rows of numbers."""
    each = [holes[row * length : (row + 1) * length] for row in range(rows)]
    return [[len(list(run)) for hole, run in groupby(row) if hole] for row in each]


def check_mask(mask: Any, cache: Any, input_ids: torch.Tensor, later: bool) -> None:
    """Refuse a mask of the caller's own making: from the first cut on, layers get a causal one over what is left.

    Ready 4-D masks are made by `generate` for static caches.

    Args:
        later: whether the call goes on with a pruned conversation, which says itself where a mask has to end.

    Raises:
        UnsupportedError: any other mask than a 2-D one.
        ValueError: a 2-D mask that is not over these prompts.
    """
    if mask is None:
        return
    if getattr(mask, "ndim", 4) == 2:
        if mask.shape[0] != input_ids.shape[0] or (mask.shape[1] < input_ids.shape[1] and not later):
            raise ValueError(
                f"attention_mask is {tuple(mask.shape)} and input_ids {tuple(input_ids.shape)}: a mask has a row for "
                "every prompt and a column for each of its tokens, in front of them one for each that is cached."
            )
        return
    if getattr(cache, "is_compileable", False):
        return
    raise UnsupportedError(
        "a pruned call with images takes a 2-D attention_mask of padding, (batch, length): another one (prefixes, "
        "packed prompts) does not fit the layers behind a cut. Use `with handle.disabled():` for the plain model."
    )


def demand_on_device(
    placeholder: torch.Tensor, everything: torch.Tensor, placeholders: list[int], sound: torch.Tensor
) -> None:
    """What `demand_sound` and the assignment of images check, inside a graph and without their details."""
    told = "compiled prompts with images need one image each, and as many placeholders as it has tokens."
    torch._assert_async((placeholder.sum(1) == upload(placeholders, placeholder.device)).all(), told)
    told = (
        f"image features or taps of the tower are not finite ({WAY_OUT}), prompts are packed into one row, or pictures "
        "are counted as text."
    )
    torch._assert_async(sound, told)
    told = f"the attention mask hides visual tokens: {HIDDEN}."
    torch._assert_async((everything | ~placeholder).all(), told)


def demand_sound(plan: Plan, single: bool, standing: bool, strange: list[tuple[str, Any]], unseen: list[int]) -> None:
    """Raise for prompts that cannot be pruned.

    Args:
        single: every row is one prompt.
        standing: positions show where pictures stand.
        strange: (what, which) of `numbers` that are not finite.
        unseen: visual tokens of every row that the mask hides.
    """
    if not single:
        raise UnsupportedError(
            "position_ids that do not count up by one mean several prompts packed into one row, and a pruned call "
            "takes one prompt per row: give a padded batch with its attention_mask."
        )
    if not standing:
        raise UnsupportedError(
            "the positions of this call count pictures as text: a model whose positions lie on several axes does so, "
            "and says nothing, without mm_token_type_ids and image_grid_thw (video_grid_thw), or with others than its "
            "processor's. Give both, as the processor makes them."
        )
    if strange:
        what, which = strange[0]
        names = " and ".join(dict.fromkeys(repr(name) for name, _ in plan.cuts))
        raise ValueError(
            f"there are NaN or infinite numbers in {what} {which}: {names} cannot tell tokens apart. {WAY_OUT}."
        )
    if any(unseen):
        row = next(row for row, count in enumerate(unseen) if count)
        raise UnsupportedError(
            f"attention_mask hides {unseen[row]} visual tokens of prompt {row}, which a cut would count as there: "
            f"mask padding only, and {HIDDEN}."
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
        for tap, values in seen_on(output).taps.items():
            if values.is_floating_point():
                found.append((f"what is seen of the vision tower's {modality}s,", tap, values))
    return found
