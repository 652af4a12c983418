"""The sequence between two cuts: which prompt columns are left, their positions and their masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from vlmprune import kernels
from vlmprune.errors import UnsupportedError
from vlmprune.parts.cuts import Positions
from vlmprune.parts.layout import Layout, upload
from vlmprune.patches.host import cache_of
from vlmprune.patches.language_models import attention_mask, window_of

__all__ = ["Segment", "Sequence", "beside", "by_columns", "real_tokens", "visible"]


#: Makes (cos, sin) of hidden states and `position_ids`, for one layer.
Rotary = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Segment:
    """What some layers hold of a conversation: the decode state of one cut, kept on the cache it describes.

    Attributes:
        first: the first decoder layer with this sequence.
        prompt: columns of the unpruned conversation, up to the last prompt with images.
        length: columns that the layers from `first` on have cached for it; whatever came later is cached as it is.
        mask: `(batch, length)` bool of real columns, or None if all are.
        shift: `(batch, 1)` positions by which a decoded token moves down, or None.
        soft: whether tokens were weakened instead of removed; such a cache cannot be decoded from.
        onward: `(batch, 1)` the position of what comes next where they lie on several axes; None where they count.
    """

    first: int
    prompt: int
    length: int
    mask: torch.Tensor | None
    shift: torch.Tensor | None
    soft: bool = False
    onward: torch.Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether nothing is gone."""
        return self.length == self.prompt

    def until(self, column: int, mask: torch.Tensor | None) -> Segment:
        """The state of a cache that holds the unpruned conversation up to `column`, at other lengths alike.

        Args:
            column: behind `prompt` where more has come since, before it where the cache was rolled back.
            mask: `(batch, columns)` bool of the real columns of the whole conversation, or None if all are.
        """
        more = column - self.prompt
        since = None if mask is None or more <= 0 else mask[:, self.prompt : column]
        real = beside(self.mask, self.length, since, max(more, 0))
        length = self.length + more
        onward = self.onward
        if onward is not None:
            onward = onward + (more if since is None else since.sum(1, keepdim=True))
        real = None if real is None else real[:, :length]
        return replace(self, prompt=column, length=length, mask=real, onward=onward)


def beside(left: torch.Tensor | None, columns: int, right: torch.Tensor | None, more: int) -> torch.Tensor | None:
    """Two masks of so many columns side by side, where None is a mask of ones."""
    if left is None:
        return None if right is None else torch.cat((ones_like(right, columns), right.bool()), 1)
    return torch.cat((left.bool(), ones_like(left, more) if right is None else right.bool()), 1)


def ones_like(mask: torch.Tensor, columns: int) -> torch.Tensor:
    """`(batch, columns)` bool ones for the rows of a mask."""
    return mask.new_ones(len(mask), columns, dtype=torch.bool)


def by_columns(handed: Any, columns: torch.Tensor, axis: int = 1) -> Any:
    """What is left of something that has a value for every column: the one rule for all that a host hands on.

    Args:
        handed: a tensor with columns along `axis` and rows, `batch` or one for all, along the axis before; or
            several, or None.
        columns: `(batch, length)` long, those to take.
    """
    if handed is None:
        return None
    if isinstance(handed, tuple):
        return tuple(by_columns(each, columns, axis) for each in handed)
    axis %= handed.ndim
    first = handed.movedim((axis - 1, axis), (0, 1))
    first = first.expand(len(columns), *first.shape[1:])
    index = columns.view(*columns.shape, *[1] * (first.ndim - 2)).expand(-1, -1, *first.shape[2:])
    return first.gather(1, index).movedim((0, 1), (axis - 1, axis))


def lower(shift: torch.Tensor | None, by: torch.Tensor) -> torch.Tensor:
    """A shift and another one on top, where None is none."""
    return by if shift is None else shift + by


def add_bias(mask: Any, bias: torch.Tensor) -> torch.Tensor:
    """Bring a `(batch, length)` bias of keys into a 4-D attention mask, as a float mask.

    Raises:
        UnsupportedError: the attention implementation takes no such mask.
    """
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4:
        raise UnsupportedError("soft masks need attn_implementation='sdpa' or 'eager'.")
    bias = nn.functional.pad(bias, (0, mask.shape[-1] - bias.shape[1]))
    return torch.where(visible(mask), bias[:, None, None], torch.finfo(bias.dtype).min)


def check_soft(layer: nn.Module, bias: torch.Tensor) -> None:
    """Refuse to train soft masks, which all layers share, under checkpointing that gives every layer its own graph."""
    checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
    checkpointed = layer.training and getattr(layer, "gradient_checkpointing", False)
    reentrant = getattr(checkpoint, "keywords", {}).get("use_reentrant", True)
    if bias.requires_grad and checkpointed and reentrant:
        raise UnsupportedError(
            "soft masks cannot be trained under re-entrant gradient checkpointing: call "
            "model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})."
        )


def real_tokens(mask: Any, length: int) -> torch.Tensor | None:
    """The `(batch, length)` bool mask of real prompt tokens behind whatever mask a call brings; None means all.

    A static cache brings ready 4-D masks (one, or one per layer type): a column is real if any query sees it.
    """
    if isinstance(mask, dict):
        mask = next((m for m in mask.values() if m is not None), None)
    if mask is None:
        return None
    return mask[:, -length:].bool() if mask.ndim == 2 else visible(mask[:, 0, :length, :length]).any(1)


def visible(mask: torch.Tensor) -> torch.Tensor:
    """A mask of what attention sees, bool or added to its scores, as bool."""
    return mask if mask.dtype == torch.bool else mask == 0


@dataclass(frozen=True)
class Sequence:
    """What is left of a prompt batch, from one cut to the next.

    On a cache that holds tokens already, the prompt is what a call brings to them.

    Attributes:
        prompt: columns of the unpruned prompt.
        columns: `(batch, length)` prompt column of every entry.
        mask: `(batch, length)` bool of real entries, or None if all are.
        lengths: real entries of every row, on the host (upper bounds inside a compiled graph).
        positions: `(batch, length)` position ids; None where the host tells layers none, or on several axes.
        rotary: (cos, sin) of every entry, each `(batch, length, dim)`.
        source: cos of the prompt's columns that `rotary` was taken of, as the host handed it; None before a layer.
        blocks: `(batch, length)` what every entry sees all of (see `Family.blocks`), -1 for padding; or None.
        moved: whether `positions` are no longer those that the host's columns have.
        shift: `(batch, 1)` positions by which decoded tokens move down, or None.
        cut: whether it is no longer what the host's own arguments say.
        past: what the cache holds in front of it, up to its first column; None if nothing.
        bias: `(batch, length)` float added to the attention scores on every entry (soft masks in training), or None.
        guesses: prompt columns at the end that are guesses at what comes after the prompt (assisted decoding).
        onward: as of `Segment`.
    """

    prompt: int
    columns: torch.Tensor
    mask: torch.Tensor | None
    lengths: list[int]
    positions: torch.Tensor | None
    rotary: tuple[torch.Tensor, torch.Tensor]
    shift: torch.Tensor | None = None
    cut: bool = False
    bias: torch.Tensor | None = None
    guesses: int = 0
    past: Segment | None = None
    source: torch.Tensor | None = None
    moved: bool = False
    blocks: torch.Tensor | None = None
    onward: torch.Tensor | None = None
    masks: dict[Any, torch.Tensor | None] = field(default_factory=dict, compare=False)

    @property
    def length(self) -> int:
        """Columns, padding included."""
        return self.columns.shape[1]

    def real(self) -> torch.Tensor:
        """`(batch, length)` bool of real entries."""
        return torch.ones_like(self.columns, dtype=torch.bool) if self.mask is None else self.mask

    def asked(self) -> torch.Tensor:
        """`(batch, length)` bool of real entries without guesses: what a method may look at."""
        return self.real() & (self.columns < self.prompt - self.guesses) if self.guesses else self.real()

    def index_of(self, layout: Layout) -> torch.Tensor:
        """`(images, tokens)` entry of every visual token in this sequence (0 for tokens that are gone)."""
        where = self.columns.new_zeros(self.columns.shape[0], self.prompt)
        entries = torch.arange(self.length, device=where.device).expand_as(self.columns)
        # padding and dropped fillers come first and share columns with nothing that is real
        where = where.scatter(1, self.columns, entries)
        sample = upload(layout.sample, where.device)
        return where[sample].gather(1, layout.position)

    def shorten(
        self, hidden: torch.Tensor, drop: torch.Tensor, dropped: list[int], positions: Positions, rotary_emb: Rotary
    ) -> tuple[torch.Tensor, Sequence]:
        """Drop entries and left-pad the rest.

        Args:
            hidden: `(batch, length, dim)`.
            drop: `(batch, length)` bool, entries to drop (real ones only).
            dropped: their number per row, on the host.
            positions: what happens to the position ids of the rest.

        Raises:
            UnsupportedError: contiguous positions where positions do not count.
        """
        close = positions == "contiguous"
        if close and self.positions is None:
            raise UnsupportedError(
                "positions='contiguous' closes the gaps that a cut makes in position ids, and those of this model lie "
                "on several axes, where there is nothing to close: use positions='original'."
            )
        lengths = [n - d for n, d in zip(self.lengths, dropped, strict=True)]
        new = max(lengths)
        empty = hidden.new_empty(*hidden.shape[:2], 0)
        # contiguous ids have another rotary embedding than the prompt's, and it is not gathered
        cos, sin = (empty, empty) if close else self.rotary
        ids = self.columns if self.positions is None else self.positions
        hidden, ids, cos, sin, index, mask, lost = kernels.call(
            "select_gather", ~drop, None, self.mask, hidden, ids, cos, sin, new, close
        )
        left = replace(
            self,
            columns=by_columns(self.columns, index),
            mask=None if self.filled(lengths) else mask,
            lengths=lengths,
            positions=None if self.positions is None else ids,
            # what an op gathers beside hidden states that need gradients counts as needing them too; nothing is
            # learned through positions, and re-entrant checkpointing cannot have layers share a graph
            rotary=(cos.detach(), sin.detach()),
            bias=by_columns(self.bias, index),
            blocks=self.blocks_of(index, mask),
            cut=True,
            masks={},
        )
        if close:
            rotary = rotary_emb(hidden, position_ids=ids)
            left = replace(left, shift=lower(self.shift, lost[:, None]), rotary=rotary, moved=True)
        return hidden, left

    def blocks_of(self, index: torch.Tensor, mask: torch.Tensor) -> torch.Tensor | None:
        """The blocks of what is left: `index` of its entries, `mask` of those that are real."""
        return None if self.blocks is None else by_columns(self.blocks, index).masked_fill(~mask, -1)

    def reach(self, at: torch.Tensor) -> torch.Tensor:
        """The last entry that each of some entries `(batch, rows)` sees: itself, or the last one of its block."""
        if self.blocks is None:
            return at
        entries = torch.arange(self.length, device=at.device).expand_as(self.blocks)
        # numbers count from -1; those of padding and of causal entries are not asked for
        ends = entries.new_zeros(len(entries), self.length + 1).scatter_reduce(1, self.blocks + 1, entries, "amax")
        group = self.blocks.gather(1, at)
        return torch.where(group < 0, at, ends.gather(1, group + 1))

    def filled(self, lengths: list[int]) -> bool:
        """Whether rows of such lengths leave no padding."""
        # inside a compiled graph lengths are upper bounds, and cannot tell that no padding is left
        known = self.mask is None or not torch.compiler.is_compiling()
        return known and min(lengths) == max(lengths)

    def handed(self, rotary: tuple[torch.Tensor, ...], hidden: torch.Tensor, rotary_emb: Rotary) -> Sequence:
        """The same entries in a layer that the host hands `rotary`: cos and sin of the prompt's columns.

        They are `(rows, prompt, dim)`. A host makes one pair for all its layers, or one for every kind of layer.
        """
        if rotary[0] is self.source:
            return self
        if self.moved:
            left = rotary_emb(hidden, position_ids=self.positions)
        elif self.cut:
            left = by_columns(rotary, self.columns)
        else:
            left = tuple(x.expand(len(self.columns), -1, -1) for x in rotary)
        return replace(self, rotary=left, source=rotary[0])

    def behind(self, past: Segment, hidden: torch.Tensor, rotary_emb: Rotary) -> Sequence:
        """The same entries in layers that hold another past of the same conversation.

        Its tokens stand `past.shift` lower, and what comes behind them moves with them.
        """
        moved = replace(self, past=past, cut=True, masks={})
        if past.shift is None or past.shift is self.past.shift:
            return moved
        down = past.shift if self.past.shift is None else past.shift - self.past.shift
        positions = self.positions - down
        rotary = rotary_emb(hidden, position_ids=positions)
        return replace(moved, positions=positions, shift=lower(self.shift, down), rotary=rotary, moved=True)

    def with_past(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """A mask of these entries behind that of the past."""
        return mask if self.past is None else beside(self.past.mask, self.past.length, mask, self.length)

    def segment(self, first: int) -> Segment:
        """The decode state of the layers from `first` on."""
        before, held = (0, 0) if self.past is None else (self.past.prompt, self.past.length)
        mask, soft = self.with_past(self.mask), self.bias is not None
        return Segment(first, before + self.prompt, held + self.length, mask, self.shift, soft, self.onward)

    def swap(
        self, layer: nn.Module, index: int, hidden: torch.Tensor, kwargs: dict[str, Any], axes: Mapping[str, int]
    ) -> dict[str, Any]:
        """A decoder layer's keyword arguments with everything that depends on the sequence exchanged.

        Args:
            axes: arguments of this host's layers that hold something for every column, and along which axis.
        """
        kind = window_of(layer)
        if kind not in self.masks:
            self.masks[kind] = self.mask_for(layer, index, kind, hidden, cache_of(kwargs))
        # the rotary embedding carries the positions; gaps in the ids would be read as packed sequences
        ids = torch.arange(self.length, device=hidden.device)[None]
        given = {name: axis for name, axis in axes.items() if kwargs.get(name) is not None}
        own = {"attention_mask": self.masks[kind], "position_embeddings": self.rotary, "position_ids": ids}
        return kwargs | {name: by_columns(kwargs[name], self.columns, axis) for name, axis in given.items()} | own

    def mask_for(self, layer: nn.Module, index: int, kind: Any, hidden: torch.Tensor, cache: Any) -> Any:
        """The attention mask of a decoder layer, whose window is of a `kind`."""
        if kind is not None and self.past is not None and self.mask is not None:
            raise UnsupportedError(
                "the rows of this batch go on with different numbers of tokens, so there would be padding inside "
                "a row, which takes the place of tokens in a sliding window, and fades the state of a recurrent layer: "
                "continue the rows one by one."
            )
        if self.bias is None:
            return attention_mask(layer, index, hidden, self.with_past(self.mask), cache, self.blocks)
        check_soft(layer, self.bias)
        # a mask over everything is never left out, so there is one to add the bias to
        mask = attention_mask(layer, index, hidden, self.with_past(self.real()), cache, self.blocks)
        return add_bias(mask, self.bias.to(hidden.dtype))

    def expand(self, hidden: torch.Tensor | None) -> torch.Tensor | None:
        """Bring `(batch, length, dim)`, or None, back to the prompt's length.

        A dropped or padding column repeats the last kept one before it, or the first kept one.
        """
        if hidden is None or not self.cut:
            return hidden
        real = torch.ones_like(self.columns) if self.mask is None else self.mask.long()
        kept = torch.zeros_like(self.columns[:, :1]).expand(-1, self.prompt).scatter_add(1, self.columns, real)
        first = self.length - kept.sum(1, keepdim=True)
        index = first + (kept.cumsum(1) - 1).clamp(min=0)
        return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
