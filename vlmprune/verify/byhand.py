"""What a pruned prefill computes, done by hand: rows are selected as a trace says, and the model's own layers run on
them. The benchmark's oracle and `vlmprune check` are made of this.

Which rows are left, where they stand and what is merged is worked out here, apart from the engine's hooks. Shared with
the engine is `sequence.attention_mask`, which asks transformers for a layer's mask; a mistake in it would be made on
both sides, so `vlmprune check` also compares decoding with masks of the whole sequence that it builds itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from typing import Any

import torch
from torch import nn

from vlmprune.parts.cuts import Merge
from vlmprune.patches.host import with_cache
from vlmprune.patches.language_models import attention_mask, rotary_of, window_of
from vlmprune.trace import CutTrace

__all__ = ["Flow", "Stretch", "flow_of", "flows", "in_stretches", "run_layers", "stretches"]


@dataclass(frozen=True)
class Flow:
    """The X' = M X of one image: row `target[e]` gets `weight[e]` times row `source[e]`; all `anchors` are replaced.

    Attributes:
        anchors, target, source: long, rows of batch row `sample`.
        weight: float.
    """

    sample: int
    anchors: torch.Tensor
    target: torch.Tensor
    source: torch.Tensor
    weight: torch.Tensor

    def apply(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(batch, length, dim)` with the anchors merged."""
        x = hidden[self.sample]
        wide = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros_like(x, dtype=wide)
        total.index_add_(0, self.target, x[self.source].to(wide) * self.weight[:, None].to(wide))
        hidden = hidden.clone()
        hidden[self.sample, self.anchors] = total[self.anchors].to(x.dtype)
        return hidden


def flow_of(cut: CutTrace, image: int, sample: int, here: dict[int, int], columns: Sequence[int]) -> Flow:
    """The flow of one image at a merging cut.

    Args:
        here: row of every prompt column that is there before the cut.
        columns: prompt column of every token of the image.
    """
    keep, row = cut.keep[image].tolist(), {t: here[column] for t, column in enumerate(columns) if column in here}
    entries = [(row[i], row[s], w) for i, s, w in entries_of(cut.merge, image) if i in row and s in row]
    into, source, weight = zip(*entries, strict=True) if entries else ((), (), ())
    kind = {"device": cut.merge.weight.device}
    return Flow(
        sample,
        torch.tensor([place for token, place in row.items() if keep[token]], dtype=torch.long, **kind),
        torch.tensor(into, dtype=torch.long, **kind),
        torch.tensor(source, dtype=torch.long, **kind),
        torch.tensor(weight, dtype=cut.merge.weight.dtype, **kind),
    )


def entries_of(merge: Merge, image: int) -> list[tuple[int, int, float]]:
    """The entries of one image, (into, source, weight) each, without those that pad."""
    into, weight = merge.into[image].tolist(), merge.weight[image].tolist()
    source = range(len(into)) if merge.source is None else merge.source[image].tolist()
    return [entry for entry in zip(into, source, weight, strict=True) if entry[2]]


def flows(cut: CutTrace, took: Any) -> bool:
    """Whether tokens of an image are written anew at a cut: where it took some of it, or has an order of its own."""
    return cut.merge is not None and (bool(took) or cut.merge.source is not None)


@dataclass(frozen=True)
class Stretch:
    """The decoder layers from `first` up to the next cut, and what they run on.

    Attributes:
        index: `(batch, length)` entries of the stretch before (of the prompt, for the first one).
        positions: `(batch, length)` position ids.
        mask: `(batch, length)` bool of real entries, or None if rows are equally long.
        shift: `(batch, 1)` positions by which decoded tokens move down.
        flows: what is merged in front of the selection.
    """

    first: int
    index: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor | None
    shift: torch.Tensor
    flows: tuple[Flow, ...] = ()

    def longer(self, by: int) -> torch.Tensor | None:
        """The mask when `by` tokens have been decoded."""
        return None if self.mask is None else torch.nn.functional.pad(self.mask, (0, by), value=True)

    def take(self, hidden: torch.Tensor) -> torch.Tensor:
        """What this stretch runs on, of the `(batch, length, dim)` that the one before left."""
        for flow in self.flows:
            hidden = flow.apply(hidden)
        return hidden.gather(1, self.index[..., None].expand(-1, -1, hidden.shape[-1]))


def stretches(
    cuts: Sequence[CutTrace],
    sample: Sequence[int],
    images: Sequence[Sequence[int]],
    shape: tuple[int, int],
    device: torch.device,
) -> list[Stretch]:
    """What every layer of a pruned prefill saw, as index tensors on `device`.

    Args:
        cuts: of a trace.
        sample: batch row of every image.
        images: prompt columns of every image's tokens.
        shape: rows and columns of the prompt batch, which has no padding.

    Raises:
        ValueError: soft masks, which remove nothing.
    """
    if any(cut.soft is not None for cut in cuts):
        raise ValueError("soft masks remove nothing: there is no oracle for them.")
    left, whole = Left.whole(*shape), Left.whole(*shape)
    seen, merged = {0: whole}, defaultdict(list)
    for layer, here in groupby(cuts, key=lambda cut: cut.layer):
        entered = left.copy()
        for cut, (image, (row, mine)) in product(here, enumerate(zip(sample, images, strict=True))):
            there = set(left.columns[row])
            gone = not_kept(cut, image, mine) & there
            if flows(cut, gone):
                entries = {column: entry for entry, column in enumerate(entered.columns[row]) if column in there}
                merged[layer].append(flow_of(cut, image, row, entries, mine))
            left.drop(row, gone, close=cut.positions == "contiguous")
        seen[layer] = left.copy()
    return told_apart(whole, seen, merged, device)


def told_apart(
    whole: Left, seen: Mapping[int, Left], merged: Mapping[int, Sequence[Flow]], device: torch.device
) -> list[Stretch]:
    """The stretches of layers: what is left of the `whole` from a layer on, where something went or was merged."""
    made, before = [], whole
    for first, now in seen.items():
        if first == 0 or now.columns != before.columns or first in merged:  # else its cuts took nothing
            made.append(stretch_of(first, before, now, merged.get(first, ()), device))
            before = now
    return made


def not_kept(cut: CutTrace, image: int, columns: Sequence[int]) -> set[int]:
    """The prompt columns of an image's tokens that a cut does not keep."""
    keep = cut.keep[image, : len(columns)].tolist()
    return {column for column, stays in zip(columns, keep, strict=True) if not stays}


@dataclass
class Left:
    """What is left of every row of a batch.

    Attributes:
        columns: prompt columns; positions: their position ids.
        shift: positions by which decoded tokens move down.
    """

    columns: list[list[int]]
    positions: list[list[int]]
    shift: list[int]

    @classmethod
    def whole(cls, batch: int, width: int) -> Left:
        """All of a prompt batch."""
        return cls([list(range(width)) for _ in range(batch)], [list(range(width)) for _ in range(batch)], [0] * batch)

    def copy(self) -> Left:
        """As it is now."""
        return Left(list(map(list, self.columns)), list(map(list, self.positions)), list(self.shift))

    @property
    def length(self) -> int:
        """Columns of the longest row."""
        return max(map(len, self.columns))

    def drop(self, row: int, gone: set[int], close: bool) -> None:
        """Take columns out of a row, and close the gaps that they leave in its position ids or not."""
        lost, columns, positions = 0, [], []
        for column, position in zip(self.columns[row], self.positions[row], strict=True):
            lost += close and column in gone
            if column not in gone:
                columns.append(column)
                positions.append(position - lost)
        self.columns[row], self.positions[row] = columns, positions
        self.shift[row] += lost


def stretch_of(first: int, before: Left, now: Left, flows: Sequence[Flow], device: torch.device) -> Stretch:
    """The layers from `first` on, by what the stretch before them had; rows are left-padded to the longest."""
    index, padded, mask = [], [], []
    for row, mine, position in zip(before.columns, now.columns, now.positions, strict=True):
        entry = {column: before.length - len(row) + i for i, column in enumerate(row)}
        fill = now.length - len(mine)
        index.append([0] * fill + [entry[column] for column in mine])
        padded.append([0] * fill + position)
        mask.append([False] * fill + [True] * len(mine))

    def upload(values: list, dtype: torch.dtype = torch.long) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return Stretch(
        first,
        upload(index),
        upload(padded),
        None if all(map(all, mask)) else upload(mask, torch.bool),
        upload([[down] for down in now.shift]),
        tuple(flows),
    )


def in_stretches(values: torch.Tensor, parts: Sequence[Stretch]) -> list[torch.Tensor]:
    """What is left in every stretch of `(..., batch, length)` values of a prompt's columns, such as its positions.

    Entries that pad have some column's value.
    """
    made = []
    for part in parts:
        values = values.gather(-1, part.index.expand(*values.shape[:-1], -1))
        made.append(values)
    return made


def run_layers(
    language_model: nn.Module,
    hidden: torch.Tensor,
    parts: Sequence[Stretch],
    positions: Sequence[torch.Tensor],
    cache: Any,
    decoded: int = 0,
    injected: Sequence[torch.Tensor] = (),
    blocks: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """All decoder layers and the norm, called as the model calls them, each stretch with its own rows and positions.

    Args:
        hidden: `(batch, length, dim)` what the first stretch runs on.
        positions: `(batch, length)` position ids, or `(axes, batch, length)`, one per stretch.
        cache: is filled.
        decoded: tokens after the prompt, `hidden` included; 0 in the prefill.
        injected: `(batch, length, dim)` what is added to the hidden states behind layers 0, 1, ..., for the entries of
            the first stretch.
        blocks: of `Family.blocks`, one per stretch, in a prefill; None where attention is causal.
    """
    number, made, more = -1, {}, list(injected)
    for index, layer in enumerate(language_model.layers):
        if 0 < index <= len(more):
            hidden = hidden + more[index - 1]
        if number + 1 < len(parts) and parts[number + 1].first == index:
            number += 1
            part, made = parts[number], {}
            if number and not decoded:
                hidden = part.take(hidden)
                more[index:] = [part.take(x) for x in more[index:]]
        if (window := window_of(layer)) not in made:  # full and sliding layers may take turns
            groups = None if blocks is None else padded_blocks(blocks[number], part.mask)
            made[window] = (
                attention_mask(layer, index, hidden, part.longer(decoded), cache, groups),
                rotary_of(layer, language_model.rotary_emb, hidden, positions[number]),
            )
        mask, rotary = made[window]
        hidden = layer(
            hidden,
            attention_mask=mask,
            position_embeddings=rotary,
            position_ids=positions[number] if positions[number].ndim == 2 else None,
            use_cache=True,
            **with_cache(cache),
        )
    return language_model.norm(hidden)


def padded_blocks(blocks: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Blocks of which entries that pad are none."""
    return blocks if mask is None else blocks.masked_fill(~mask, -1)
