"""Calls on a cache that holds tokens: what every layer has cached, masks and positions to go with it."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn

from vlmprune.engine.channels import FRAME, SEGMENTS
from vlmprune.engine.plan import Plan
from vlmprune.engine.sequence import Segment
from vlmprune.errors import UnsupportedError
from vlmprune.parts.layout import download
from vlmprune.patches.host import cache_of
from vlmprune.patches.language_models import attention_mask, window_of

__all__ = ["Decode", "catch_up", "held", "length_of", "resume", "rolled_back"]


def length_of(kwargs: dict, pictured: bool) -> int | None:
    """Columns that layer 0 holds in the cache that a call brings, read once a call; 0 without a cache.

    None for a step on a static cache, since asking that waits for the device; a call with pictures waits anyway.
    """
    cache = cache_of(kwargs)
    if cache is None:
        return 0
    if not pictured and getattr(cache, "is_compileable", False) and given_tokens(kwargs).shape[1] == 1:
        return None
    length = cache.get_seq_length()
    return int(length) if isinstance(length, torch.Tensor) else length


def rolled_back(cache: Any, segments: list[Segment], length: int | None) -> list[Segment]:
    """The decode state of a cache that may have been reset or cropped since; it is noted on the cache.

    Args:
        length: of `length_of`.
    """
    if length is None or not segments or (column := length + missing(segments)) >= segments[0].prompt:
        return segments
    # what comes next takes the place of what went, and is as real as it says
    left = [segment.until(column, None) for segment in segments] if length else []
    setattr(cache, SEGMENTS, left)
    return left


def resume(plan: Plan, inner: nn.Module, kwargs: dict, segments: list[Segment], length: int | None) -> dict:
    """The inner model's keyword arguments for a call on a pruned cache.

    Args:
        plan: of the model whose call this is.
        kwargs: of `catch_up`, counting in positions and columns of the unpruned conversation.
        segments: the cache's decode state.
        length: of `length_of`.
    """
    cache, mask = cache_of(kwargs), kwargs.get("attention_mask")
    if any(segment.soft for segment in segments):
        raise UnsupportedError(
            "this cache was filled under soft masks, which are for training alone: call .eval() on the method's "
            "modules before generating."
        )
    kwargs, first, prompt = dict(kwargs), segments[0], segments[0].prompt
    tokens = given_tokens(kwargs)
    batch, queries = tokens.shape[:2]
    check_rows(segments, batch)
    new = mask[:, prompt:] if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
    positions = kwargs.get("position_ids")
    if positions is None:
        start = (cache.get_seq_length() if length is None else length) + missing(segments)
        positions = torch.arange(queries, device=tokens.device)[None] + start
    positions = positions.expand(batch, -1)
    # it also shows the layers that this call was recognised
    kwargs[FRAME] = Decode(plan, segments, plan.family.language_model(inner).rotary_emb, positions, new)
    if first.first == 0:
        kwargs["attention_mask"] = decode_mask(first, cache, 0, batch, queries, new, tokens.device)
        positions = positions if first.shift is None else positions - first.shift
    kwargs["position_ids"] = positions
    return kwargs


def check_rows(segments: list[Segment], batch: int) -> None:
    """Refuse a call of other rows than those that filled the cache."""
    noted = [x for segment in segments for x in (segment.mask, segment.shift) if x is not None]
    if noted and len(noted[0]) != batch:
        raise UnsupportedError(
            f"this pruned cache was filled by {len(noted[0])} rows, and this call brings {batch}: its rows cannot be "
            "repeated or selected by hand. Repeat the prompts of the first call instead, as `generate` does with "
            "num_beams or num_return_sequences."
        )


class Decode:
    """One forward pass on a cache whose prompt was pruned: acts where that was at some layer above 0."""

    def __init__(self, plan: Plan, segments: list[Segment], rotary_emb: nn.Module, positions: torch.Tensor, new: Any):
        self.plan, self.segments, self.rotary_emb, self.positions, self.new = plan, segments, rotary_emb, positions, new
        self.ready: dict[Any, tuple] = {}

    def enter(self, index: int, layer: nn.Module, hidden: torch.Tensor, kwargs: dict) -> tuple[torch.Tensor, dict]:
        segment = next((s for s in reversed(self.segments) if s.first <= index), None)
        if segment is None or segment.first == 0:
            return hidden, kwargs  # the model's own arguments already fit these layers
        kind = (segment.first, window_of(layer))
        if kind not in self.ready:
            cache = cache_of(kwargs)
            mask = decode_mask(segment, cache, index, hidden.shape[0], hidden.shape[1], self.new, hidden.device)
            positions = self.positions if segment.shift is None else self.positions - segment.shift
            self.ready[kind] = (
                attention_mask(layer, index, hidden, mask, cache),
                self.rotary_emb(hidden, position_ids=positions),
                positions,
            )
        mask, rotary, positions = self.ready[kind]
        return hidden, kwargs | {"attention_mask": mask, "position_embeddings": rotary, "position_ids": positions}


def decode_mask(
    segment: Segment, cache: Any, index: int, batch: int, queries: int, new: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    """The 2-D mask over what layer `index` has cached and this call's queries; None if all of it is real.

    Args:
        new: `(batch, columns)` mask of everything that came after the prompt, or None for all real.
    """
    if segment.mask is None and new is None:
        return None
    length, offset = cache.get_mask_sizes(queries, index)
    rest = int(length) + int(offset) - segment.length
    kept = segment.mask
    if kept is None:
        kept = torch.ones(batch, segment.length, dtype=torch.bool, device=device)
    tail = torch.ones(batch, rest, dtype=torch.bool, device=device)
    if new is not None:
        tail[:, : new.shape[1]] = new.bool()
    return torch.cat((kept, tail), 1)


def given_tokens(kwargs: dict) -> torch.Tensor:
    """The ids or embeddings that a call brings, `(batch, queries, ...)`."""
    return kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]


def missing(segments: list[Segment]) -> int:
    """Columns of the conversation that are not in layer 0, whose length the cache gives for its own."""
    return segments[0].prompt - segments[0].length if segments and segments[0].first == 0 else 0


def held(kwargs: dict, segments: list[Segment], length: int) -> list[Segment]:
    """What the layers hold in front of a call with images, from layer 0 on; nothing where the cache is empty.

    Args:
        kwargs: of `catch_up`.
        segments: the cache's decode state, empty if nothing was pruned.
        length: of `length_of`.
    """
    if not length:
        return []
    column, mask = length + missing(segments), kwargs.get("attention_mask")
    whole = [] if segments and segments[0].first == 0 else [Segment(0, 0, 0, None, None)]
    return [segment.until(column, mask) for segment in whole + segments]


def catch_up(kwargs: dict, segments: list[Segment], length: int | None) -> dict:
    """A call's arguments without the columns that the cache already holds, and with a 2-D mask or none.

    To continue a conversation, `generate` slices its input by the cache's physical length, which a cut at layer 0 made
    short: so many of the old tokens come again in front of the new ones. A caller who slices by hand brings the new
    ones alone; the end of the sequence, which the mask or the positions tell, says which it is.

    Args:
        length: of `length_of`.

    Raises:
        UnsupportedError: all tokens come again, or as many of them as cannot be told from new ones.
        ValueError: a mask or positions that end elsewhere than what the cache stands for and what comes.
    """
    cache, mask, short = cache_of(kwargs), kwargs.get("attention_mask"), missing(segments)
    queries, again = given_tokens(kwargs).shape[1], False
    if queries == 1 or not length:
        return kwargs  # a step brings a new token
    positions = kwargs.get("position_ids")
    ready = mask is not None and (isinstance(mask, dict) or mask.ndim != 2)
    column, end = length + short, None
    if ready:
        mask, end = conversation(mask, length + queries, short, positions)
    elif mask is not None:
        end = mask.shape[1]
    elif positions is not None and segments:  # one host read a turn
        end = int(positions.max()) + 1
    if end is not None:
        again = short and end == length + queries
        if not again and end != column + queries:
            refuse_end("position_ids end" if mask is None or ready else "attention_mask ends", end, column, queries)
    if short:
        if again and queries <= short:
            raise UnsupportedError(
                f"this piece of {queries} tokens was cached before: `prefill_chunk_size` must be greater than the "
                f"{short} tokens that were pruned, to continue on their cache."
            )
        if again:
            names = [name for name in ("input_ids", "inputs_embeds", "position_ids") if kwargs.get(name) is not None]
            kwargs = kwargs | {name: kwargs[name][:, short:] for name in names}
        elif mask is not None and ready:
            raise UnsupportedError(
                "new tokens alone, behind padding on a static cache that is pruned, are not supported: give `generate` "
                "the input_ids of the whole conversation, or call it with a dynamic cache."
            )
    if not ready:
        return kwargs
    if mask is not None and segments:
        # the masks of its later steps do not reach as far as the conversation, and do not tell
        setattr(cache, SEGMENTS, [segment.until(mask.shape[1], mask) for segment in segments])
    return kwargs | {"attention_mask": mask}


def refuse_end(told: str, end: int, column: int, queries: int) -> NoReturn:
    """Raise for a call whose end does not lie `queries` columns behind those that the cache stands for."""
    if end == queries:
        raise UnsupportedError(
            f"the whole conversation ({queries} tokens) comes again to a cache that stands for {column} of it: "
            "`generate` does so in a later turn with prompt_lookup_num_tokens or assistant_model, and would cache it "
            "twice, pruned or not. Leave these out in later turns."
        )
    raise ValueError(
        f"the {told} at column {end}; the cache stands for {column} columns of the conversation (those that were "
        f"pruned included), and this call brings {queries}: give an attention_mask of {column + queries} columns, or "
        "position_ids that go on behind them."
    )


def conversation(
    mask: Any, columns: int, short: int, positions: torch.Tensor | None
) -> tuple[torch.Tensor | None, int | None]:
    """The padding behind the ready masks of a static cache, with one host read.

    Args:
        columns: what is cached and what the call brings.
        short: columns of the conversation that are not cached.
        positions: `(batch, queries)` position ids of the call.

    Returns:
        The `(batch, columns)` bool mask of real columns, or None if all are; and the column at which the conversation
        ends, None if nothing tells.

    Raises:
        UnsupportedError: there may be padding, and the masks do not tell where.
    """
    seen = last_row(mask, columns)
    ends = None if positions is None else positions[:, -1] + 1
    if seen is None:
        # the positions of one row tell whether it has padding, not where
        end = int(ends[0]) if ends is not None and len(ends) == 1 else None
        if end not in (columns, columns + short):
            refuse_untold(columns)
        return None, end
    counts = seen.sum(1)
    ends = counts if ends is None else ends.expand(len(seen))
    padding, ends = download(torch.stack((columns - counts, ends + columns - counts)))
    seen = seen if any(padding) else None
    if positions is None:
        return seen, None if short else columns
    # in the last column of a batch one row is real at least, and its position tells; padding may end the others
    return seen, columns if columns in ends else max(ends)


def last_row(mask: Any, columns: int) -> torch.Tensor | None:
    """The `(batch, columns)` bool mask of what the last query of a ready 4-D mask sees; None if it does not see all."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if mask is None or mask.ndim != 4 or mask.shape[-1] < columns:
        return None
    mask = mask[:, 0, -1, :columns]
    return mask if mask.dtype == torch.bool else mask == 0


def refuse_untold(columns: int) -> NoReturn:
    raise UnsupportedError(
        "continuing a batch or a padded row on a static cache with a sliding window, or on one with less columns than "
        f"the conversation ({columns}), is not supported: its masks do not tell the padding. Call `generate` with a "
        "dynamic cache, or continue the rows one by one and without padding."
    )
