"""Calls on a cache whose prompt was pruned: what every layer has cached, masks and positions to go with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlmprune.errors import UnsupportedError
from vlmprune.plan import FRAME
from vlmprune.sequence import Segment, attention_mask
from vlmprune.taps import sliding_window

__all__ = ["Decode", "resume"]


def resume(language_model: nn.Module, kwargs: dict, segments: list[Segment]) -> dict:
    """The inner model's keyword arguments for a call without images on a pruned cache.

    Args:
        kwargs: as the caller gave them, counting in positions and columns of the unpruned prompt.
        segments: the cache's decode state.
    """
    cache, mask = kwargs["past_key_values"], kwargs.get("attention_mask")
    if any(segment.soft for segment in segments):
        raise UnsupportedError(
            "this cache was filled under soft masks, which are for training alone: call .eval() on the method's "
            "modules before generating."
        )
    first, prompt = segments[0], segments[0].prompt
    kwargs = kwargs | drop_overlap(kwargs, first, cache)
    tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    batch, queries = tokens.shape[:2]
    new = mask[:, prompt:] if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
    positions = kwargs.get("position_ids")
    if positions is None:
        below = first.length if first.first == 0 else prompt
        start = prompt + cache.get_seq_length() - below
        positions = torch.arange(queries, device=tokens.device)[None] + start
    positions = positions.expand(batch, -1)
    if any(s.first > 0 for s in segments):
        kwargs[FRAME] = Decode(segments, language_model.rotary_emb, positions, new)
    if first.first == 0:
        kwargs["attention_mask"] = decode_mask(first, cache, 0, batch, queries, new, tokens.device)
        positions = positions if first.shift is None else positions - first.shift
    kwargs["position_ids"] = positions
    return kwargs


class Decode:
    """One forward pass on a cache whose prompt was pruned at some layer above 0."""

    def __init__(self, segments: list[Segment], rotary_emb: nn.Module, positions: torch.Tensor, new: Any):
        self.segments, self.rotary_emb, self.positions, self.new = segments, rotary_emb, positions, new
        self.ready: dict[Any, tuple] = {}

    def enter(self, index: int, layer: nn.Module, hidden: torch.Tensor, kwargs: dict) -> tuple[torch.Tensor, dict]:
        segment = next((s for s in reversed(self.segments) if s.first <= index), None)
        if segment is None or segment.first == 0:
            return hidden, kwargs  # the model's own arguments already fit these layers
        kind = (segment.first, sliding_window(layer.self_attn))
        if kind not in self.ready:
            cache = kwargs["past_key_values"]
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


def drop_overlap(kwargs: dict, first: Segment, cache: Any) -> dict:
    """The inputs without the columns that the cache already holds.

    To continue a conversation, `generate` slices its input by the cache's physical length, which a cut at layer 0 made
    short: so many of the old tokens come again in front of the new ones. A caller who slices by hand brings the new
    ones alone; the end of the sequence, which the mask or the positions tell, says which it is.
    """
    short = first.prompt - first.length if first.first == 0 else 0
    given = {k: kwargs[k] for k in ("input_ids", "inputs_embeds", "position_ids") if kwargs.get(k) is not None}
    queries = (given["input_ids"] if "input_ids" in given else given["inputs_embeds"]).shape[1]
    if not 0 < short < queries:
        return {}
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        end = mask.shape[1]
    elif "position_ids" in given:
        end = int(given["position_ids"].max()) + 1  # one host read a turn, none in a decode step
    else:
        return {}
    if int(cache.get_seq_length()) + queries != end:
        return {}
    return {k: x[:, short:] for k, x in given.items()}
