"""What a call of several tokens brings to a cache that holds tokens: new ones alone, or old ones in front of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from vlmprune.engine.channels import SEGMENTS
from vlmprune.engine.decode import given_tokens, missing
from vlmprune.engine.sequence import Segment, visible
from vlmprune.errors import UnsupportedError
from vlmprune.parts.layout import download
from vlmprune.patches.host import cache_of
from vlmprune.patches.language_models import counted

__all__ = ["Brings", "Turn", "catch_up"]

#: Arguments of the inner model that hold something for every column of the call, and along which axis.
COLUMNS = {"input_ids": 1, "inputs_embeds": 1, "position_ids": -1}


class Brings(Enum):
    """What the tokens of a call are; see `Turn.brings`."""

    NEW = "new tokens alone"
    OVERLAP = "as many old tokens as were pruned, and the new ones behind them"
    WHOLE = "the whole conversation again"
    ELSEWHERE = "tokens that do not go on where the cache ends"


@dataclass(frozen=True)
class Turn:
    """A call on a cache that holds tokens, in numbers.

    Attributes:
        cached: columns that layer 0 holds; pruned: those of the conversation in front that it does not hold any more.
        brought: tokens of the call.
        end: column at which the conversation ends, by what `told` names; None if nothing tells.
        ready: whether the call brings ready masks, of a static cache.
        real: `(batch, cached + brought)` bool of the real columns behind ready masks; None if all are, or none came.
    """

    cached: int
    pruned: int
    brought: int
    end: int | None
    told: str
    ready: bool = False
    real: torch.Tensor | None = None

    @property
    def stands_for(self) -> int:
        """Columns of the conversation that the cache stands for."""
        return self.cached + self.pruned

    @property
    def brings(self) -> Brings:
        """Told by where the conversation ends, from which the call's tokens count back."""
        if self.end is None or self.end == self.stands_for + self.brought:
            return Brings.NEW
        if self.end == self.cached + self.brought:
            return Brings.OVERLAP
        return Brings.WHOLE if self.end == self.brought else Brings.ELSEWHERE


def catch_up(kwargs: dict, segments: list[Segment], length: int | None, origin: int = 0) -> dict:
    """A call's arguments without the columns that the cache already holds, and with a 2-D mask or none.

    To continue a conversation, `generate` slices its input by the cache's physical length, which a cut at layer 0 made
    short: so many of the old tokens come again in front of the new ones. A caller who slices by hand brings the new
    ones alone.

    Args:
        length: of `decode.length_of`.
        origin: position of a conversation's first token.

    Raises:
        UnsupportedError: all tokens come again, or as many of them as cannot be told from new ones.
        ValueError: a mask or positions that end elsewhere than what the cache stands for and what comes.
    """
    if given_tokens(kwargs).shape[1] == 1 or not length:
        return kwargs  # a step brings a new token
    turn = read_turn(kwargs, segments, length, origin)
    check_turn(turn)
    if turn.brings is Brings.OVERLAP:
        kwargs = without_old(kwargs, turn)
    if not turn.ready:
        return kwargs
    if turn.real is not None and segments:
        # the masks of its later steps do not reach as far as the conversation, and do not tell
        reached = [segment.until(turn.real.shape[1], turn.real) for segment in segments]
        setattr(cache_of(kwargs), SEGMENTS, reached)
    return kwargs | {"attention_mask": turn.real}


def read_turn(kwargs: dict, segments: list[Segment], length: int, origin: int) -> Turn:
    """Where the conversation of a call ends, by its mask, else by its positions."""
    mask, positions = kwargs.get("attention_mask"), counted(kwargs.get("position_ids"))
    positions = positions - origin if origin and positions is not None else positions
    brought, pruned = given_tokens(kwargs).shape[1], missing(segments)
    if isinstance(mask, dict) or (mask is not None and mask.ndim != 2):
        real, end = conversation(mask, length + brought, pruned, positions)
        return Turn(length, pruned, brought, end, "position_ids end", ready=True, real=real)
    if mask is not None:
        return Turn(length, pruned, brought, mask.shape[1], "attention_mask ends")
    # one host read a turn
    end = int(positions.max()) + 1 if positions is not None and segments else None
    return Turn(length, pruned, brought, end, "position_ids end")


def without_old(kwargs: dict, turn: Turn) -> dict:
    """A call's arguments without the tokens in front that come again."""
    if turn.brought <= turn.pruned:
        raise UnsupportedError(
            f"this piece of {turn.brought} tokens was cached before: `prefill_chunk_size` must be greater than the "
            f"{turn.pruned} tokens that were pruned, to continue on their cache."
        )
    given = {name: axis for name, axis in COLUMNS.items() if kwargs.get(name) is not None}
    new = turn.brought - turn.pruned
    return kwargs | {name: kwargs[name].narrow(axis, turn.pruned, new) for name, axis in given.items()}


def check_turn(turn: Turn) -> None:
    """Refuse a call whose tokens do not go on where the cache ends, or of which nothing tells where."""
    match turn.brings:
        case Brings.WHOLE:
            raise UnsupportedError(
                f"the whole conversation ({turn.brought} tokens) comes again to a cache that stands for "
                f"{turn.stands_for} of it: `generate` does so in a later turn with prompt_lookup_num_tokens or "
                "assistant_model, and would cache it twice, pruned or not. Leave these out in later turns."
            )
        case Brings.ELSEWHERE:
            raise ValueError(
                f"the {turn.told} at column {turn.end}; the cache stands for {turn.stands_for} columns of the "
                f"conversation (those that were pruned included), and this call brings {turn.brought}: give an "
                f"attention_mask of {turn.stands_for + turn.brought} columns, or position_ids that go on behind them."
            )
        case Brings.NEW if turn.pruned and turn.real is not None:
            raise UnsupportedError(
                "new tokens alone, behind padding on a static cache that is pruned, are not supported: give `generate` "
                "the input_ids of the whole conversation, or call it with a dynamic cache."
            )


def conversation(
    mask: Any, columns: int, pruned: int, positions: torch.Tensor | None
) -> tuple[torch.Tensor | None, int | None]:
    """The padding behind the ready masks of a static cache, with one host read.

    Args:
        columns: what is cached and what the call brings.
        pruned: columns of the conversation that are not cached any more.
        positions: `(batch, queries)` position ids of the call that count its columns, or None.

    Returns:
        The `(batch, columns)` bool mask of real columns, or None if all are; and the column at which the conversation
        ends, None if nothing tells.

    Raises:
        UnsupportedError: there may be padding, and the masks do not tell where.
    """
    seen = last_row(mask, columns)
    if seen is None:
        return None, end_of_one(positions, columns, pruned)
    counts = seen.sum(1)
    ends = counts if positions is None else (positions[:, -1] + 1).expand(len(seen))
    padding, ends = download(torch.stack((columns - counts, ends + columns - counts)))
    seen = seen if any(padding) else None
    if positions is None:
        return seen, None if pruned else columns
    # in the last column of a batch one row is real at least, and its position tells; padding may end the others
    return seen, columns if columns in ends else max(ends)


def end_of_one(positions: torch.Tensor | None, columns: int, pruned: int) -> int:
    """Where the conversation of a row without padding ends, by its positions; they cannot tell where padding is."""
    end = int(positions[0, -1]) + 1 if positions is not None and len(positions) == 1 else None
    if end not in (columns, columns + pruned):
        raise UnsupportedError(
            "continuing a batch or a padded row on a static cache with a sliding window, or on one with less columns "
            f"than the conversation ({columns}), is not supported: its masks do not tell the padding. Call `generate` "
            "with a dynamic cache, or continue the rows one by one and without padding."
        )
    return end


def last_row(mask: Any, columns: int) -> torch.Tensor | None:
    """The `(batch, columns)` bool mask of what the last query of a ready 4-D mask sees; None if it does not see all."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if mask is None or mask.ndim != 4 or mask.shape[-1] < columns:
        return None
    return visible(mask[:, 0, -1, :columns])
