"""Positions on three axes (M-RoPE): where pictures stand, and where a conversation goes on behind them.

A picture's tokens stand on a grid of time, height and width; text counts on, alike on all axes, behind the largest
position so far. So columns do not tell where a conversation goes on: it is noted with the cache, `Segment.onward`.
Hosts note it on the model, where the next conversation overwrites it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vlmprune.engine.sequence import Segment
from vlmprune.errors import UnsupportedError
from vlmprune.parts.layout import Layout
from vlmprune.patches import Family

__all__ = ["check_given", "counted_again", "onward", "places_of_turn", "stand_on_axes"]

GIVE = "give the model what its processor made: image_grid_thw (video_grid_thw) and mm_token_type_ids"


def check_given(family: Family, kwargs: dict, encoded: dict[str, Any], length: int) -> None:
    """Refuse a call of whose arguments the host cannot tell where its pictures stand: it would count them as text.

    Args:
        encoded: what the encoders made, by modality.
        length: columns in a cache that the patch did not fill.

    Raises:
        UnsupportedError: something is missing, or positions are a plain count.
    """
    positions = kwargs.get("position_ids")
    if positions is not None and positions.ndim == 3 and len(positions) in (family.axes, family.axes + 1):
        return  # whether they are a plain count is read with the census
    if positions is not None:
        raise UnsupportedError(
            f"position_ids of shape {tuple(positions.shape)} count pictures as text, and the tokens of a picture stand "
            f"on {family.axes} axes in {family.model_type} models: leave position_ids out, and {GIVE}."
        )
    needed = ["mm_token_type_ids", *(f"{modality}_grid_thw" for modality in encoded)]
    if lacking := [name for name in needed if kwargs.get(name) is None]:
        raise UnsupportedError(
            f"without {lacking[0]} a {family.model_type} model counts pictures as text and says nothing: {GIVE}."
        )
    if length:
        raise UnsupportedError(
            "pictures behind a cache that this patch did not fill: where its conversation ends is not known on the "
            f"{family.axes} axes of positions. Give position_ids, or the whole conversation with an empty cache."
        )


def stand_on_axes(kwargs: dict, encoded: dict[str, Any], holes: dict[str, torch.Tensor]) -> torch.Tensor:
    """`()` bool: whether the positions that a call brings, or what the host makes them of, show where pictures stand.

    Args:
        encoded: as in `check_given`.
        holes: by modality `(batch, length)` bool, its placeholders.
    """
    positions, types = kwargs.get("position_ids"), kwargs.get("mm_token_type_ids")
    placeholder = torch.stack(list(holes.values())).any(0)
    if positions is None:
        return (types.bool() == placeholder).all()
    if max((len(item) for output in encoded.values() for item in output.pooler_output), default=0) == 1:
        return torch.ones((), dtype=torch.bool, device=placeholder.device)  # which stands where a word would
    pairs = placeholder[:, 1:] & placeholder[:, :-1]
    counted = (positions[-3:].diff(dim=-1) == 1).all(0) | ~pairs
    return ~(pairs.any(1) & counted.all(1)).any()


def onward(positions: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """`(batch, 1)` the position at which a conversation goes on behind a prompt.

    Args:
        positions: `(3 or 4, batch, length)`, the last three of which are its positions.
        real: `(batch, length)` bool of real columns, None if all are.
    """
    top = positions[-3:].amax(0)
    return (top if real is None else top.masked_fill(~real, -1)).amax(1, keepdim=True) + 1


def counted_again(inner: nn.Module, kwargs: dict) -> dict:
    """A call's arguments with the count of its columns in front of its positions, as `generate` has it in a first turn.

    In a later one it has just added the model's `rope_deltas` to that count, which tells what of the conversation comes
    again.
    """
    positions = kwargs.get("position_ids")
    if positions is None or positions.ndim != 3 or len(positions) != 1 or positions.shape[-1] == 1:
        return kwargs
    added = inner.rope_deltas.to(positions.device)
    added = added.repeat_interleave(positions.shape[1] // len(added), 0)
    return kwargs | {"position_ids": torch.cat((positions - added, positions.expand(3, -1, -1)))}


def places_of_turn(
    family: Family, inner: nn.Module, kwargs: dict, layout: Layout, real: torch.Tensor | None, past: Segment
) -> torch.Tensor:
    """`(3, batch, length)` positions of new text and pictures behind a cache, by the host's own rule.

    Args:
        layout: of the new pictures.
        real: `(batch, length)` bool of real columns of the call, None if all are.
        past: what layer 0 holds in front of them.
    """
    ids, merge = kwargs["input_ids"], inner.config.vision_config.spatial_merge_size
    types, grids = torch.zeros_like(ids), {}
    for number, modality in enumerate(("image", "video"), 1):
        mine = [grid for grid in layout.grids if bool(grid.frames) == (modality == "video")]
        if mine:
            types = types.masked_fill(ids == family.token(inner, modality), number)
            sizes = [(grid.views, *(merge * side for side in grid.side)) for grid in mine]
            grids[f"{modality}_grid_thw"] = torch.tensor(sizes)
    rule: Callable = inner.get_rope_index
    more = {name: kwargs[name] for name in inspect.signature(rule).parameters.keys() & {"second_per_grid_ts"}}
    mask = None if real is None else real.long()
    positions, _ = rule(ids, mm_token_type_ids=types, attention_mask=mask, **grids, **more)
    return positions + past.onward
