"""What pruning could cost at best: the language model on the kept rows, which are known beforehand.

The oracle runs the same vision tower and the whole projector, then the language model on the rows that a method kept:
no tap, no score, no selection, indices made beforehand. Where a method cuts at deeper layers, the layers below run on
all rows. Its logits are those of the pruned model, but for methods that merge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from vlmprune.eval.bench.workload import Workload
from vlmprune.sequence import attention_mask
from vlmprune.trace import Trace

__all__ = ["Oracle", "Plain", "Stretch", "stretches"]


@dataclass(frozen=True)
class Stretch:
    """The decoder layers from `first` up to the next cut, and what they run on.

    Attributes:
        index: `(batch, length)` entries of the stretch before (of the prompt, for the first one).
        positions: `(batch, length)` position ids.
        mask: `(batch, length)` bool of real entries, or None if rows are equally long.
        shift: `(batch, 1)` positions by which decoded tokens move down.
    """

    first: int
    index: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor | None
    shift: torch.Tensor

    def longer(self, by: int) -> torch.Tensor | None:
        """The mask when `by` tokens have been decoded."""
        return None if self.mask is None else torch.nn.functional.pad(self.mask, (0, by), value=True)


def stretches(trace: Trace, work: Workload) -> list[Stretch]:
    """What every layer of a pruned prefill saw, as index tensors on the model's device.

    Raises:
        ValueError: soft masks, which remove nothing.
    """
    columns = [list(range(work.length)) for _ in range(work.batch)]
    positions, shift = [list(row) for row in columns], [0] * work.batch
    seen = {0: ([list(row) for row in columns], [list(row) for row in positions], list(shift))}
    for cut in trace.cuts:
        if cut.soft is not None:
            raise ValueError("soft masks remove nothing: there is no oracle for them.")
        for row, keep in zip(trace.sample, cut.keep.tolist(), strict=True):
            gone = {work.start + t for t in range(work.visual) if not keep[t]}
            if cut.positions == "contiguous":
                lost, moved = 0, []
                for column, position in zip(columns[row], positions[row], strict=True):
                    lost += column in gone
                    moved.append(position - lost)
                positions[row] = moved
                shift[row] += lost
            stay = [i for i, column in enumerate(columns[row]) if column not in gone]
            columns[row] = [columns[row][i] for i in stay]
            positions[row] = [positions[row][i] for i in stay]
        seen[cut.layer] = ([list(row) for row in columns], [list(row) for row in positions], list(shift))

    made: list[Stretch] = []
    before = ([list(range(work.length))] * work.batch, work.length)
    for first, (cols, ids, moved) in sorted(seen.items()):
        if made and cols == before[0]:
            continue  # a cut that took nothing
        rows, width = before
        length = max(map(len, cols))
        index, padded, mask = [], [], []
        for row, mine, position in zip(rows, cols, ids, strict=True):
            entry = {column: width - len(row) + i for i, column in enumerate(row)}
            fill = length - len(mine)
            index.append([0] * fill + [entry[column] for column in mine])
            padded.append([0] * fill + position)
            mask.append([False] * fill + [True] * len(mine))
        ragged = any(len(mine) != length for mine in cols)

        def upload(values: list, dtype: torch.dtype = torch.long) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=work.model.device)

        made.append(
            Stretch(
                first,
                upload(index),
                upload(padded),
                upload(mask, torch.bool) if ragged else None,
                upload([[m] for m in moved]),
            )
        )
        before = (cols, length)
    return made


class Plain:
    """The model as it stands, patched or not: a prefill through its first token, and decode steps."""

    def __init__(self, work: Workload):
        self.work, self.logits, self.cache = work, None, None

    def prefill(self) -> torch.Tensor:
        """`(batch, 1)` first tokens; logits and cache stay on the object."""
        out = self.work.model(**self.work.inputs, use_cache=True, logits_to_keep=1)
        self.logits, self.cache = out.logits[:, -1:], out.past_key_values
        return self.logits.argmax(-1)

    def place(self, number: int) -> Any:
        """What decode step `number` (from 0) needs to know beforehand: position ids, as `generate` counts them."""
        position = torch.full((self.work.batch, 1), self.work.length + number)
        return position.to(self.work.model.device)

    def step(self, token: torch.Tensor, place: Any) -> torch.Tensor:
        """The next `(batch, 1)` tokens."""
        out = self.work.model(input_ids=token, position_ids=place, past_key_values=self.cache, use_cache=True)
        self.logits = out.logits[:, -1:]
        return self.logits.argmax(-1)


class Oracle(Plain):
    """The unpatched model's parts on the rows that `trace` kept."""

    def __init__(self, work: Workload, trace: Trace):
        super().__init__(work)
        self.inner = work.family.inner(work.model)
        self.language_model = work.family.language_model(self.inner)
        self.head = work.model.get_output_embeddings()
        self.stretches = stretches(trace, work)
        # one short prompt is a plain call of the language model; with a mask that call would wait for the device
        self.whole = len(self.stretches) == 1 and self.stretches[0].mask is None
        ids, device = work.inputs["input_ids"], work.model.device
        # entries of (text rows of all samples, then visual rows of all samples) that the first layer sees
        text = work.length - work.visual
        column = torch.arange(work.length)
        row = torch.arange(work.batch)[:, None]
        visual = (column >= work.start) & (column < work.start + work.visual)
        where_text = torch.where(column < work.start, column, column - work.visual)
        entry = torch.where(
            visual, work.batch * text + row * work.visual + column - work.start, row * text + where_text
        )
        self.entry = entry.to(device).gather(1, self.stretches[0].index)
        self.text_ids = torch.cat((ids[:, : work.start], ids[:, work.start + work.visual :]), 1)

    def prefill(self) -> torch.Tensor:
        encoded = self.inner.get_image_features(**self.work.vision, return_dict=True)
        text = self.language_model.embed_tokens(self.text_ids).flatten(0, 1)
        hidden = torch.cat((text, *encoded.pooler_output))[self.entry]
        first = self.stretches[0]
        self.cache = DynamicCache(config=self.language_model.config)
        if self.whole:
            hidden = self.language_model(
                inputs_embeds=hidden,
                position_ids=first.positions,
                past_key_values=self.cache,
                use_cache=True,
            ).last_hidden_state
        else:
            hidden = self.layers(hidden, self.stretches, [s.positions for s in self.stretches], 0)
        self.logits = self.head(hidden[:, -1:])
        return self.logits.argmax(-1)

    def place(self, number: int) -> Any:
        positions = [super(Oracle, self).place(number) - stretch.shift for stretch in self.stretches]
        return number, positions

    def step(self, token: torch.Tensor, place: Any) -> torch.Tensor:
        number, positions = place
        if self.whole:
            out = self.work.model(
                input_ids=token, position_ids=positions[0], past_key_values=self.cache, use_cache=True
            )
            self.logits = out.logits[:, -1:]
        else:
            hidden = self.layers(self.language_model.embed_tokens(token), self.stretches, positions, number + 1)
            self.logits = self.head(hidden[:, -1:])
        return self.logits.argmax(-1)

    def layers(
        self, hidden: torch.Tensor, parts: list[Stretch], positions: list[torch.Tensor], decoded: int
    ) -> torch.Tensor:
        """All decoder layers, called as the model calls them, each stretch with its own rows, positions and mask.

        Args:
            decoded: tokens after the prompt, `hidden` included; 0 in the prefill.
        """
        number = -1
        for index, layer in enumerate(self.language_model.layers):
            if number + 1 < len(parts) and parts[number + 1].first == index:
                number += 1
                part = parts[number]
                if number and not decoded:
                    hidden = hidden.gather(1, part.index[..., None].expand(-1, -1, hidden.shape[-1]))
                mask = attention_mask(layer, index, hidden, part.longer(decoded), self.cache)
                rotary = self.language_model.rotary_emb(hidden, position_ids=positions[number])
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=rotary,
                position_ids=positions[number],
                past_key_values=self.cache,
                use_cache=True,
            )
        return self.language_model.norm(hidden)
