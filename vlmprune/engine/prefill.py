"""The frame of one pruned prefill: measures, cuts, and puts everything back into shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from vlmprune.engine.axes import onward
from vlmprune.engine.census import count_prompts
from vlmprune.engine.channels import SEGMENTS, Seen, seen_on
from vlmprune.engine.decided import check_flow, check_reduction, whose
from vlmprune.engine.effect import tell_idle
from vlmprune.engine.finite import WAY_OUT, cut_is_finite, demand
from vlmprune.engine.injected import Injected
from vlmprune.engine.placement import check_device, loaded
from vlmprune.engine.plan import Plan
from vlmprune.engine.prompt import prompt_layout
from vlmprune.engine.sequence import Segment, Sequence
from vlmprune.errors import CutNotRunError, UnsupportedError, check_first_run
from vlmprune.parts.cuts import Cut, Reduction
from vlmprune.parts.layers import DecoderLayer
from vlmprune.parts.layout import Layout, download, upload
from vlmprune.parts.taps import BlockTap, DecoderTap, Hidden, Tap, TowerTap
from vlmprune.patches.host import cache_of, returned_cache
from vlmprune.patches.language_models import decoder_layer, rotary_of
from vlmprune.trace import CutTrace, Trace

__all__ = ["Prefill"]

SOFT_EPS = 1e-20  # the least weight of a token under a soft mask, whose logarithm must exist


class Prefill:
    """One pruned forward pass.

    Args:
        input_ids: `(batch, length)`, what the call brings.
        mask: padding mask that ends with them.
        features: the encoders' outputs by modality.
        past: what the layers hold in front of them, from layer 0 on; empty on an empty cache.
        guesses: tokens at the end of the prompt that are none of it; methods must not look at them.
        positions: `(batch, length)` position ids, where the call brings them and no mask.
        blocks: of `Family.blocks`.
        stand: as of `count_prompts`.
    """

    def __init__(
        self,
        plan: Plan,
        inner: nn.Module,
        input_ids: torch.Tensor,
        mask: Any,
        features: dict[str, Any],
        past: list[Segment],
        guesses: int = 0,
        positions: torch.Tensor | None = None,
        blocks: torch.Tensor | None = None,
        stand: Callable[[dict[str, torch.Tensor]], torch.Tensor] | None = None,
    ):
        self.plan, self.guesses, self.ids, self.blocks = plan, guesses, input_ids, blocks
        self.past, self.cache = {segment.first: segment for segment in past}, None
        language_model = plan.family.language_model(inner)
        self.rotary_emb, self.norm = language_model.rotary_emb, language_model.norm
        self.census = count_prompts(plan, inner, input_ids, mask, features, guesses, positions, stand)
        self.text_after, self.text_before = self.census.text_after, self.census.text_before
        self.text_between = self.census.text_between
        self.prompt_lengths = self.census.lengths
        self.layout = prompt_layout(plan, inner, self.census, features)
        for method in plan.methods:
            method.check_inputs(self.layout)
        self.seen = seen_in_tower(plan, features, self.layout)
        self.pending = plan.decoder_cuts
        self.sequence: Sequence | None = None
        self.by_layer: list[Sequence] = []
        self.cuts: list[CutTrace] = []
        self.first: dict[str, Layout] = {}  # by method, what `tell_idle` wants to know
        self.last: dict[str, list[int]] = {}
        self.segments: list[Segment] = []
        self.finished = False
        self.onward: torch.Tensor | None = None  # what `begin` is shown
        self.injected: Injected | None = None

    def begin(self, kwargs: dict) -> dict:
        """Take what the language model gets, and its layers do not, out of its arguments."""
        family = self.plan.family
        if family.axes > 1:
            self.onward = onward(kwargs["position_ids"], self.census.real)
        if family.injected is None or kwargs.get(family.injected[1]) is None:
            return kwargs
        visual, features = (kwargs[name] for name in family.injected)
        self.injected = Injected.of(visual, features, self.plan.facts.decoder_layers)
        return kwargs | dict.fromkeys(family.injected)

    def enter(self, index: int, layer: nn.Module, hidden: torch.Tensor, kwargs: dict) -> tuple[torch.Tensor, dict]:
        """Do all that is to be done at the input of decoder layer `index`."""
        check_first_run(index, len(self.by_layer))
        check_device(layer, hidden)
        self.rotary = partial(rotary_of, layer, self.rotary_emb)
        noted = self.go_on(index, hidden, kwargs)
        if self.injected is not None:
            hidden = self.injected.before(index, hidden, self.sequence.columns)
        before, here = self.sequence, [entry for entry in self.pending if entry[1].at.layer == index]
        self.measure(index, layer, hidden, here)
        while self.pending and self.pending[0][1].at.layer == index:
            hidden = self.cut(*self.pending.pop(0), hidden)
        if not noted or self.sequence is not before:
            self.segments.append(self.sequence.segment(index))
        self.measure(index, layer, hidden, self.pending)
        self.by_layer.append(self.sequence)
        if self.sequence.cut:
            kwargs = self.sequence.swap(layer, index, hidden, kwargs, self.plan.family.layer_columns)
        return hidden, kwargs

    def go_on(self, index: int, hidden: torch.Tensor, kwargs: dict) -> bool:
        """Make the sequence that of layer `index`, before any cut there.

        Returns:
            Whether the cache needs no note of it: the host's own arguments fit it, or the layer before has noted it.
        """
        past = self.past.get(index)
        noted = past is None or (self.sequence is None and past.whole)
        if self.sequence is None:
            self.cache, self.sequence = cache_of(kwargs), self.whole(hidden, kwargs, past)
            # where positions lie on several axes, the host does not keep with the cache where they go on
            noted = noted and self.onward is None
        elif past is not None:
            self.sequence = self.sequence.behind(past, hidden, self.rotary)
        self.sequence = self.sequence.handed(kwargs["position_embeddings"], hidden, self.rotary)
        return noted

    def whole(self, hidden: torch.Tensor, kwargs: dict, past: Segment | None) -> Sequence:
        """What the first layer gets `(batch, length, dim)` of, before any cut."""
        batch, length, _ = hidden.shape
        positions = kwargs.get("position_ids") if self.onward is None else None
        return Sequence(
            prompt=length,
            columns=torch.arange(length, device=hidden.device).expand(batch, -1),
            mask=self.census.real,
            lengths=self.prompt_lengths,
            positions=None if positions is None or positions.ndim != 2 else positions.expand(batch, -1),
            rotary=kwargs["position_embeddings"],
            guesses=self.guesses,
            shift=None if past is None else past.shift,
            past=past,
            blocks=self.blocks,
            onward=self.onward,
        )

    def measure(self, index: int, layer: nn.Module, hidden: torch.Tensor, cuts: list[tuple[str, Cut]]) -> None:
        """Measure the taps of this layer that some cuts want to see and nobody has measured yet."""
        for tap in taps_at(index, cuts, DecoderTap):
            if tap not in self.seen:
                # no_grad not as a decorator: a compiled graph can hold the one and not the other
                with torch.no_grad(), loaded(layer):
                    self.seen[tap] = tap.measure(decoder_layer(layer), hidden.detach(), self)

    def watch(self, index: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Let the block taps of layer `index` see what one of its two blocks read and wrote."""
        for tap in taps_at(index, self.pending, BlockTap):
            with torch.no_grad():
                value = tap.measure(before.detach(), after.detach(), self)
                self.seen[tap] = self.seen[tap] + value if tap in self.seen else value

    def past_keys(self, layer: DecoderLayer) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The keys that a decoder layer holds in front of the sequence, and which keys of both are real.

        Returns:
            `(batch, heads, columns, dim)`, in a sliding window the last ones, or None if there are none; and
            `(batch, columns + length)` bool, or None if all are real.
        """
        if (past := self.sequence.past) is None:
            return None, self.sequence.mask
        index, window = layer.index, layer.window
        keys = self.cache.layers[index].keys
        columns = min(past.length, keys.shape[-2] if keys.ndim == 4 else 0)
        if columns < (past.length if window is None else min(past.length, window - 1)):
            raise UnsupportedError(
                f"a method of this patch looks at attention in decoder layer {index}, and "
                f"{type(self.cache).__name__} does not hold that layer's keys as they are: continue with images on a "
                "dynamic or static cache, or with a method that cuts before the language model."
            )
        real = self.sequence.with_past(self.sequence.mask)
        return keys[:, :, :columns], None if real is None else real[:, past.length - columns :]

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """The language model's own last norm of `(batch, length, dim)`."""
        return self.norm(hidden)

    def flat_index(self) -> torch.Tensor:
        """`(images, tokens)` index of every visual token into `(batch * length)` of the current sequence."""
        sample = upload(self.layout.sample, self.layout.device)
        return self.sequence.index_of(self.layout) + sample[:, None] * self.sequence.length

    def cut(self, name: str, cut: Cut, hidden: torch.Tensor) -> torch.Tensor:
        """Do one cut on `(batch, length, dim)`."""
        layout, at = self.layout, self.flat_index()
        seen = self.seen_by(name, cut, hidden, at)
        reduction = cut.reduce(seen, layout)
        check_reduction(where := whose(self.plan, cut), reduction, layout.alive, layout.alive_counts)
        if reduction.soft is not None:
            self.soften(name, cut, reduction, at)
            return hidden
        keep = reduction.keep & layout.alive
        # the tower's were looked at with the placeholders
        taps = [values for tap, values in seen.items() if not isinstance(tap, TowerTap)]
        counts, patches = self.count(name, cut, reduction, keep, cut_is_finite(taps, reduction.scores, layout.alive))
        self.cuts.append(CutTrace(cut.at.layer, name, cut.positions, keep, reduction.merge, reduction.scores))
        self.first.setdefault(name, layout)
        self.last[name] = counts
        if counts == layout.alive_counts and not cut.reorders:
            return hidden  # a budget of all tokens is the exact identity
        if reduction.merge is not None:
            flow = reduction.merge
            check_flow(where, flow, layout.width)
            merge = partial(torch.ops.vlmprune.merge, at=at, alive=layout.alive, keep=keep, **vars(flow))
            hidden = merge(hidden)
            if self.injected is not None:
                self.injected = self.injected.merged(cut.at.layer, self.sequence.columns, merge)
        hidden = self.drop(cut, hidden, layout.alive & ~keep, counts, at)
        self.layout = replace(layout, alive=keep, alive_counts=counts, alive_patches=patches)
        if cut.at.layer == 0:
            self.layout = replace(self.layout, entered=counts, entered_patches=patches)
        return hidden

    def seen_by(self, name: str, cut: Cut, hidden: torch.Tensor, at: torch.Tensor) -> dict[Tap, torch.Tensor]:
        """What a cut asked to see, in its order."""
        if missing := [tap for tap in cut.see if tap not in self.seen and not isinstance(tap, Hidden)]:
            raise CutNotRunError(
                f"the cut of {name!r} at decoder layer {cut.at.layer} did not get to see {missing[0]}."
            )
        return {
            tap: hidden.detach().flatten(0, 1)[at] if isinstance(tap, Hidden) else self.seen[tap] for tap in cut.see
        }

    def count(
        self, name: str, cut: Cut, reduction: Reduction, keep: torch.Tensor, sound: torch.Tensor
    ) -> tuple[list[int], list[int] | None]:
        """Tokens of every image that stay, and patches alone where that is known, by one read or by none.

        Args:
            keep: `(images, tokens)` bool.
            sound: `()` bool, whether all numbers are finite.

        Raises:
            ValueError: they are not.
        """
        layout = self.layout
        strange = (
            f"the cut of {name!r} at decoder layer {cut.at.layer} sees NaN or infinite numbers or makes NaN scores, "
            f"and cannot tell tokens apart. {WAY_OUT}."
        )
        if reduction.counts is None:
            # one read for all: later budgets are shares of the patches that entered
            found = torch.cat((keep.sum(1), (keep & ~layout.newline).sum(1), sound[None].long()))
            *found, good = download(found)
            counts, patches = found[: len(layout)], found[len(layout) :]
            if not good:
                raise ValueError(strange)
        else:
            demand(sound, strange)
            counts, patches = reduction.counts, self.patches(cut, reduction, keep)
        # checked where the tensor is, so that nothing waits for it
        told = f"method {name!r} promised {counts} kept tokens per image and kept other numbers."
        torch._assert_async((keep.sum(1) == upload(counts, keep.device)).all(), told)
        if reduction.patches is not None:
            told = f"method {name!r} promised {reduction.patches} kept patches per image and kept other numbers."
            found = (keep & ~layout.newline).sum(1)
            torch._assert_async((found == upload(reduction.patches, keep.device)).all(), told)
        return counts, patches

    def patches(self, cut: Cut, reduction: Reduction, keep: torch.Tensor) -> list[int] | None:
        """Patches of every image that stay where the tokens that do are known beforehand; None if nobody will ask."""
        if reduction.patches is not None:
            return reduction.patches
        if not self.layout.newlines:
            return reduction.counts
        asked = cut.at.layer == 0 and self.pending  # newlines competed with patches
        return download((keep & ~self.layout.newline).sum(1)) if asked else None

    def drop(
        self, cut: Cut, hidden: torch.Tensor, dropped: torch.Tensor, counts: list[int], at: torch.Tensor
    ) -> torch.Tensor:
        """Shorten the sequence, and `(batch, length, dim)` with it.

        Args:
            dropped: `(images, tokens)` bool.
            counts: tokens of every image that stay.
            at: of `flat_index`.
        """
        layout, sequence = self.layout, self.sequence
        lost = [0] * len(sequence.lengths)
        for row, before, after in zip(layout.sample, layout.alive_counts, counts, strict=True):
            lost[row] += before - after
        # padding entries of the layout point at column 0 or repeat a column: add, don't overwrite
        gone = dropped.long()
        gone = gone.new_zeros(sequence.columns.numel()).scatter_add(0, at.flatten(), gone.flatten())
        gone = gone.view_as(sequence.columns) > 0
        hidden, self.sequence = sequence.shorten(hidden, gone, lost, cut.positions, self.rotary)
        return hidden

    def soften(self, name: str, cut: Cut, reduction: Reduction, at: torch.Tensor) -> None:
        """Weaken tokens for all later layers instead of removing them."""
        layout, sequence = self.layout, self.sequence
        if sequence.past is not None:
            raise UnsupportedError("soft masks are for training, which begins with an empty cache.")
        soft, standing = torch.where(layout.alive, reduction.soft, 0), reduction.keep & layout.alive
        if layout.soft is not None:
            soft, standing = soft * layout.soft, standing & layout.standing
        # padding entries of the layout point at column 0 or repeat a column: add, don't overwrite
        log = torch.where(layout.alive, (soft + SOFT_EPS).log(), 0)
        bias = log.new_zeros(sequence.columns.numel()).scatter_add(0, at.flatten(), log.flatten())
        self.sequence = replace(sequence, bias=bias.view_as(sequence.columns), cut=True, masks={})
        self.layout = replace(layout, soft=soft, standing=standing)
        self.cuts.append(CutTrace(cut.at.layer, name, cut.positions, standing, None, reduction.scores, soft))

    def check(self) -> None:
        """Raise if a cut has not run: a silent no-op would pass for a pruned call."""
        if self.pending:
            left = ", ".join(f"{name!r} at decoder layer {cut.at.layer}" for name, cut in self.pending)
            raise CutNotRunError(f"this call carried images, and these cuts did not run: {left}.")

    def finish(self, output: Any) -> None:
        """Restore lengths, leave the decode state on the cache, file the trace."""
        self.check()
        self.finished = True
        tell_idle(self.plan, self.first, self.last)
        output.last_hidden_state = self.sequence.expand(output.last_hidden_state)
        if output.hidden_states is not None:
            # entry 0 is the input of layer 0 as that layer got it, entry i the output of layer i - 1
            made_by = zip(output.hidden_states, [self.by_layer[0], *self.by_layer[:-1]], strict=False)
            output.hidden_states = (*[left.expand(h) for h, left in made_by], output.last_hidden_state)
        if (cache := returned_cache(output)) is not None:
            self.leave_on(cache)
        self.plan.trace = Trace(
            grids=list(self.layout.grids),
            sample=self.layout.sample,
            cuts=self.cuts,
            prompt_length=self.sequence.prompt,
            prompt_lengths=self.prompt_lengths,
            kv_lengths=[s.length for s in self.by_layer],
            row_lengths=[s.lengths for s in self.by_layer],
        )

    def leave_on(self, cache: Any) -> None:
        """Leave the decode state on the cache that a call handed back."""
        if cache is not self.cache and int(cache.get_seq_length()):
            raise UnsupportedError(
                "this call handed back a filled cache that its first decoder layer did not get, so later calls on "
                "it would decode at wrong positions: use the model classes of a supported release of transformers."
            )
        setattr(cache, SEGMENTS, self.segments)


def seen_in_tower(plan: Plan, features: dict[str, Any], layout: Layout) -> dict[Tap, torch.Tensor]:
    """The tower's taps, `(images, tokens, ...)`, off the encoders' outputs."""
    seen = [seen_on(output) for output in features.values()]
    check_seen(plan, seen)
    views = {tap: torch.cat([one.taps[tap].to(layout.device) for one in seen]) for tap in plan.tower_taps}
    return {tap: layout.from_tower(values) for tap, values in views.items()}


def check_seen(plan: Plan, seen: list[Seen]) -> None:
    """Raise for encoders' outputs that were computed without this patch."""
    if missing := [tap for tap in plan.tower_taps if any(tap not in one.taps for one in seen)]:
        raise CutNotRunError(
            f"the image features came without the tower's {missing[0]}: they were computed by an unpatched model "
            "or while the patch was disabled. Encode the images with the patched model."
        )
    if (plan.tower_cuts or plan.pixel_cuts) and any(one.plan is not plan for one in seen):
        raise CutNotRunError(
            "the image features came without what this patch does before the language model: they were computed "
            "by an unpatched model, under another patch, or while this one was disabled. Encode the images with "
            "the patched model."
        )


def taps_at(index: int, cuts: list[tuple[str, Cut]], kind: type[Tap]) -> list[Any]:
    """The taps of a kind that some cuts want to see of decoder layer `index`, each once."""
    looks = [tap for _, cut in cuts for tap in cut.see if isinstance(tap, kind)]
    return list(dict.fromkeys([tap for tap in looks if tap.layer == index]))
