"""What pruning could cost at best: the language model on the kept rows, which are known beforehand.

The oracle runs the same vision tower and the whole projector, then the language model on the rows that a method kept:
no tap, no score, no selection, indices made beforehand. Where a method cuts at deeper layers, the layers below run on
all rows. Its logits are those of the pruned model, but for methods that merge.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from vlmprune.eval.bench.workload import Workload
from vlmprune.patches.host import returned_cache, with_cache
from vlmprune.trace import Trace
from vlmprune.verify import byhand
from vlmprune.verify.byhand import Stretch, in_stretches, run_layers

__all__ = ["Oracle", "PlainRun", "Stretch", "stretches"]


def stretches(trace: Trace, work: Workload) -> list[Stretch]:
    """What every layer of a pruned prefill saw (`byhand.stretches`).

    Raises:
        ValueError: soft masks, which remove nothing.
    """
    ends, images = [work.start] * work.batch, []
    for grid, row in zip(trace.grids, trace.sample, strict=True):
        images.append(range(ends[row], ends[row] + grid.tokens))
        ends[row] += grid.tokens
    return byhand.stretches(trace.cuts, trace.sample, images, (work.batch, work.length), work.model.device)


class PlainRun:
    """The model as it stands, patched or not: a prefill through its first token, and decode steps."""

    def __init__(self, work: Workload):
        self.work, self.logits, self.cache = work, None, None

    def prefill(self) -> torch.Tensor:
        """`(batch, 1)` first tokens; logits and cache stay on the object."""
        out = self.work.model(**self.work.inputs, use_cache=True, logits_to_keep=1)
        self.logits, self.cache = out.logits[:, -1:], returned_cache(out)
        return self.logits.argmax(-1)

    def place(self, number: int) -> Any:
        """What decode step `number` (from 0) needs to know beforehand: position ids, as `generate` counts them."""
        work = self.work
        place = torch.full((work.batch, 1), work.end + number)
        if work.family.axes > 1:
            count = torch.full_like(place, work.length + number)
            place = torch.stack((count, *[place] * work.family.axes))
        return place.to(work.model.device)

    def step(self, token: torch.Tensor, place: Any) -> torch.Tensor:
        """The next `(batch, 1)` tokens."""
        out = self.work.model(input_ids=token, position_ids=place, use_cache=True, **with_cache(self.cache))
        self.logits = out.logits[:, -1:]
        return self.logits.argmax(-1)


class Oracle(PlainRun):
    """The unpatched model's parts on the rows that `trace` kept."""

    def __init__(self, work: Workload, trace: Trace):
        super().__init__(work)
        self.inner = work.family.inner(work.model)
        self.language_model = work.family.language_model(self.inner)
        self.head = work.model.get_output_embeddings()
        self.stretches = parts = stretches(trace, work)
        self.blocks = work.family.blocks(work.inputs)
        # one short prompt is a plain call of the language model; with a mask that call would wait for the device
        plain = self.blocks is None and work.family.injected is None
        self.whole = plain and len(parts) == 1 and parts[0].mask is None
        if self.blocks is not None:
            self.blocks = in_stretches(self.blocks, parts)
        self.places = [part.positions + work.family.origin for part in parts]
        if work.family.axes > 1:
            self.places = in_stretches(work.places, parts)
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
        self.cache = DynamicCache(config=self.language_model.config)
        if self.whole:
            hidden = self.language_model(
                inputs_embeds=hidden,
                position_ids=self.places[0],
                use_cache=True,
                **with_cache(self.cache),
            ).last_hidden_state
        else:
            injected = [
                torch.cat((torch.zeros_like(text), *features))[self.entry]
                for features in getattr(encoded, "deepstack_features", ())
            ]
            more = {"injected": injected, "blocks": self.blocks}
            hidden = run_layers(self.language_model, hidden, self.stretches, self.places, self.cache, **more)
        self.logits = self.head(hidden[:, -1:])
        return self.logits.argmax(-1)

    def place(self, number: int) -> Any:
        positions = [self.work.end + number - stretch.shift for stretch in self.stretches]
        if self.work.family.axes > 1:
            positions = [each.expand(self.work.family.axes, -1, -1) for each in positions]
        return number, positions

    def step(self, token: torch.Tensor, place: Any) -> torch.Tensor:
        number, positions = place
        if self.whole:
            out = self.work.model(input_ids=token, position_ids=positions[0], use_cache=True, **with_cache(self.cache))
            self.logits = out.logits[:, -1:]
        else:
            hidden = self.language_model.embed_tokens(token)
            hidden = run_layers(self.language_model, hidden, self.stretches, positions, self.cache, number + 1)
            self.logits = self.head(hidden[:, -1:])
        return self.logits.argmax(-1)
