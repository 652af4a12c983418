"""Calls on a cache that holds tokens: what every layer has cached, masks and positions to go with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlmprune.engine.channels import FRAME, SEGMENTS
from vlmprune.engine.plan import Plan
from vlmprune.engine.sequence import Segment, beside
from vlmprune.errors import UnsupportedError
from vlmprune.patches.host import cache_of
from vlmprune.patches.language_models import attention_mask, is_recurrent, rotary_of, window_of

__all__ = ["Decode", "given_tokens", "held", "length_of", "missing", "resume", "rolled_back"]


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


def check_padding(plan: Plan, new: torch.Tensor) -> None:
    """Refuse rows of different lengths, `(batch, tokens)` of their mask, in front of recurrent layers.

    Raises:
        UnsupportedError: there is padding.
    """
    if not new.all():
        raise UnsupportedError(
            "the rows of this batch go on with different numbers of tokens, and padding inside a row fades the state "
            f"of the recurrent layers of {plan.family.model_type} models (unpruned, too): continue the rows one by one."
        )


def resume(plan: Plan, inner: nn.Module, kwargs: dict, segments: list[Segment], length: int | None) -> dict:
    """The inner model's keyword arguments for a call on a pruned cache.

    Args:
        plan: of the model whose call this is.
        kwargs: of `turn.catch_up`, counting in positions and columns of the unpruned conversation.
        segments: the cache's decode state.
        length: of `length_of`.
    """
    cache, mask = cache_of(kwargs), kwargs.get("attention_mask")
    kwargs, first, prompt = dict(kwargs), segments[0], segments[0].prompt
    for name in plan.family.kinds:  # text alone comes, or pictures that see no further than they would
        kwargs.pop(name, None)
    tokens = given_tokens(kwargs)
    batch, queries = tokens.shape[:2]
    check_cache(segments, batch)
    new = mask[:, prompt:] if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
    if plan.facts.recurrent and queries > 1 and new is not None:
        check_padding(plan, new[:, -queries:])
    if first.onward is None:
        positions = unpruned_positions(kwargs, segments, length, plan.family.origin)
    else:
        positions = behind_pictures(kwargs, segments, length)
    rotary_emb, shift = plan.family.language_model(inner).rotary_emb, first.shift if first.first == 0 else None
    # it also shows the layers that this call was recognised
    kwargs[FRAME] = Decode(plan, segments, rotary_emb, positions, new, shift)
    if first.first == 0:
        kwargs["attention_mask"] = decode_mask(first, cache, 0, batch, queries, new, tokens.device)
    kwargs["position_ids"] = positions if shift is None else positions - shift
    return kwargs


def unpruned_positions(kwargs: dict, segments: list[Segment], length: int | None, origin: int) -> torch.Tensor:
    """`(..., batch, queries)` position ids of a call's tokens in the unpruned conversation."""
    tokens, positions = given_tokens(kwargs), kwargs.get("position_ids")
    if positions is None:
        start = (cache_of(kwargs).get_seq_length() if length is None else length) + missing(segments)
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None] + start + origin
    return positions.expand(*positions.shape[:-2], len(tokens), -1)


def behind_pictures(kwargs: dict, segments: list[Segment], length: int | None) -> torch.Tensor:
    """`(3, batch, queries)` positions of text behind a cache whose pictures were pruned.

    Of what a call brings only a mask is asked, and positions on three axes, which are as they are: those that
    `generate` counts come from the model's own note, which may be of another conversation.

    Args:
        length: of `decode.length_of`.
    """
    given, tokens, first = kwargs.get("position_ids"), given_tokens(kwargs), segments[0]
    if given is not None and (given.ndim == 2 or len(given) == 3):
        return given.expand(3, len(tokens), -1)
    mask, queries = kwargs.get("attention_mask"), tokens.shape[1]
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] >= first.prompt + queries:
        number = mask[:, first.prompt :].long().cumsum(1)[:, -queries:] - 1
    else:
        columns = (cache_of(kwargs).get_seq_length() if length is None else length) + missing(segments)
        number = columns - first.prompt + torch.arange(queries, device=tokens.device)[None]
    return (first.onward + number).expand(3, len(tokens), -1)


def check_cache(segments: list[Segment], batch: int) -> None:
    """Refuse a cache that was filled in training, and a call of other rows than those that filled it."""
    if any(segment.soft for segment in segments):
        raise UnsupportedError(
            "this cache was filled under soft masks, which are for training alone: call .eval() on the method's "
            "modules before generating."
        )
    noted = [x for segment in segments for x in (segment.mask, segment.shift, segment.onward) if x is not None]
    if noted and len(noted[0]) != batch:
        raise UnsupportedError(
            f"this pruned cache was filled by {len(noted[0])} rows, and this call brings {batch}: its rows cannot be "
            "repeated or selected by hand. Repeat the prompts of the first call instead, as `generate` does with "
            "num_beams or num_return_sequences."
        )


class Decode:
    """One forward pass on a cache whose prompt was pruned: acts where that was at some layer above 0.

    Args:
        positions: `(..., batch, queries)` position ids in the unpruned conversation, of one axis or several.
        new: `(batch, columns)` mask of everything that came after the prompt, or None.
        shift: `(batch, 1)` by which the model's own arguments stand lower, or None.
    """

    def __init__(
        self,
        plan: Plan,
        segments: list[Segment],
        rotary_emb: nn.Module,
        positions: torch.Tensor,
        new: torch.Tensor | None,
        shift: torch.Tensor | None,
    ):
        self.plan, self.segments, self.rotary_emb = plan, segments, rotary_emb
        self.positions, self.new, self.shift = positions, new, shift
        self.ready: dict[Any, dict[str, Any]] = {}

    def enter(self, index: int, layer: nn.Module, hidden: torch.Tensor, kwargs: dict) -> tuple[torch.Tensor, dict]:
        segment = next((s for s in reversed(self.segments) if s.first <= index), None)
        if segment is None or segment.first == 0 or is_recurrent(layer):
            return hidden, kwargs  # the model's own arguments already fit these layers
        kind = (segment.first, window_of(layer))
        if kind not in self.ready:
            cache = cache_of(kwargs)
            mask = decode_mask(segment, cache, index, hidden.shape[0], hidden.shape[1], self.new, hidden.device)
            mask = attention_mask(layer, index, hidden, mask, cache)
            self.ready[kind] = {"attention_mask": mask} | self.moved(segment, layer, hidden)
        return hidden, kwargs | self.ready[kind]

    def moved(self, segment: Segment, layer: nn.Module, hidden: torch.Tensor) -> dict[str, Any]:
        """What places the queries in the layers of a segment; nothing where the host's own arguments do."""
        if segment.shift is self.shift:
            return {}
        positions = self.positions if segment.shift is None else self.positions - segment.shift
        rotary = rotary_of(layer, self.rotary_emb, hidden, positions)
        return {"position_embeddings": rotary, "position_ids": positions}


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
    if rest < (queries if new is None else new.shape[1]):
        raise UnsupportedError(
            f"columns have gone from the cache of decoder layer {index} (a KV-cache press, or a cut by hand), and this "
            "call's mask is of all of them: run prompts one by one, without padding (docs/kv-cache.md)."
        )
    tail = torch.ones(batch, rest, dtype=torch.bool, device=device)
    if new is not None:
        tail[:, : new.shape[1]] = new.bool()
    return beside(segment.mask, segment.length, tail, rest)


def given_tokens(kwargs: dict) -> torch.Tensor:
    """The ids or embeddings that a call brings, `(batch, queries, ...)`."""
    return kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]


def missing(segments: list[Segment]) -> int:
    """Columns of the conversation that are not in layer 0, whose length the cache gives for its own."""
    return segments[0].prompt - segments[0].length if segments and segments[0].first == 0 else 0


def held(kwargs: dict, segments: list[Segment], length: int) -> list[Segment]:
    """What the layers hold in front of a call with images, from layer 0 on; nothing where the cache is empty.

    Args:
        kwargs: of `turn.catch_up`.
        segments: the cache's decode state, empty if nothing was pruned.
        length: of `length_of`.
    """
    if not length:
        return []
    column, mask = length + missing(segments), kwargs.get("attention_mask")
    whole = [] if segments and segments[0].first == 0 else [Segment(0, 0, 0, None, None)]
    return [segment.until(column, mask) for segment in whole + segments]
