"""The hooks, and the frame of one call that rides through them in the keyword arguments.

Life of a pruned prefill: `BeforeModel` makes a `Prefill` frame and puts it into the keyword arguments; the host hands
these to every decoder layer, where `BeforeLayer` takes it out, measures taps and cuts; `AfterLanguageModel` restores
lengths, leaves the decode state on the cache and files the trace. `BeforeTower`, `BeforeTowerLayer` and `AfterTower`
do the same inside the vision tower. Nothing is ambient: threads and interleaved generations cannot mix.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from vlmprune.cuts import Cut, Reduction
from vlmprune.errors import CutNotRunError, UnsupportedError
from vlmprune.layout import upload
from vlmprune.plan import FRAME, Plan
from vlmprune.prompt import prompt_layout
from vlmprune.sequence import Segment, Sequence, attention_mask, merge_tokens
from vlmprune.taps import BlockTap, DecoderTap, Hidden, Tap, sliding_window
from vlmprune.tower import SEEN, AfterKeys, AfterTower, BeforeTower, BeforeTowerLayer, RememberSizes
from vlmprune.trace import CutTrace, Trace
from vlmprune.watch import Watch

__all__ = ["Plan", "install", "is_hook", "remove"]

SEGMENTS = "_vlmprune_segments"  # attribute of a cache: its decode state
SOFT_EPS = 1e-20  # the least weight of a token under a soft mask, whose logarithm must exist


# --- prefill --------------------------------------------------------------------------------------------------------


class Prefill:
    """One pruned forward pass."""

    def __init__(self, plan: Plan, inner: nn.Module, input_ids: torch.Tensor, mask: Any, features: Any):
        self.plan = plan
        self.rotary_emb = plan.family.language_model(inner).rotary_emb
        self.layout, self.real, self.lengths, self.text_after = prompt_layout(plan, inner, input_ids, mask, features)
        self.prompt_lengths = self.lengths
        seen = getattr(features, SEEN, {})
        if missing := [tap for tap in plan.tower_taps if tap not in seen]:
            raise CutNotRunError(
                f"the image features came without the tower's {missing[0]}: they were computed by an unpatched model "
                "or while the patch was disabled. Encode the images with the patched model."
            )
        self.seen: dict[Tap, torch.Tensor] = {
            tap: self.layout.from_tower(seen[tap].to(self.layout.device)) for tap in plan.tower_taps
        }
        self.pending = plan.decoder_cuts
        self.sequence: Sequence | None = None
        self.by_layer: list[Sequence] = []
        self.cuts: list[CutTrace] = []
        self.segments: list[Segment] = []
        self.finished = False

    def enter(self, index: int, layer: nn.Module, hidden: torch.Tensor, kwargs: dict) -> tuple[torch.Tensor, dict]:
        """Do all that is to be done at the input of decoder layer `index`."""
        if self.sequence is None:
            batch, length, _ = hidden.shape
            self.sequence = Sequence(
                prompt=length,
                columns=torch.arange(length, device=hidden.device).expand(batch, -1),
                mask=self.real,
                lengths=self.lengths,
                positions=kwargs["position_ids"].expand(batch, -1),
                rotary=tuple(x.expand(batch, -1, -1) for x in kwargs["position_embeddings"]),
            )
        here = [cut for _, cut in self.pending if cut.at.layer == index]
        self.measure(index, layer, hidden, [tap for cut in here for tap in cut.see])
        before = self.sequence
        while self.pending and self.pending[0][1].at.layer == index:
            hidden = self.cut(*self.pending.pop(0), hidden)
        if self.sequence is not before:
            self.segments = [s for s in self.segments if s.first != index] + [self.sequence.segment(index)]
        self.measure(index, layer, hidden, [tap for _, cut in self.pending for tap in cut.see])
        self.by_layer.append(self.sequence)
        if self.sequence.cut:
            kwargs = self.sequence.swap(layer, index, hidden, kwargs)
        return hidden, kwargs

    @torch.no_grad()
    def measure(self, index: int, layer: nn.Module, hidden: torch.Tensor, taps: list[Tap]) -> None:
        """Measure the taps of this layer that nobody has measured yet."""
        for tap in taps:
            if isinstance(tap, DecoderTap) and tap.layer == index and tap not in self.seen:
                self.seen[tap] = tap.measure(layer, hidden.detach(), self)

    @torch.no_grad()
    def watch(self, index: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Let the block taps of layer `index` see what one of its two blocks read and wrote."""
        for tap in dict.fromkeys(tap for _, cut in self.pending for tap in cut.see):
            if isinstance(tap, BlockTap) and tap.layer == index:
                value = tap.measure(before.detach(), after.detach(), self)
                self.seen[tap] = self.seen[tap] + value if tap in self.seen else value

    def flat_index(self) -> torch.Tensor:
        """`(images, tokens)` index of every visual token into `(batch * length)` of the current sequence."""
        sample = upload(self.layout.sample, self.layout.device)
        return self.sequence.index_of(self.layout) + sample[:, None] * self.sequence.length

    def cut(self, name: str, cut: Cut, hidden: torch.Tensor) -> torch.Tensor:
        layout, sequence = self.layout, self.sequence
        at = self.flat_index()
        seen = {tap: self.seen[tap] for tap in cut.see if tap in self.seen}
        if any(isinstance(tap, Hidden) for tap in cut.see):
            seen[Hidden()] = hidden.detach().flatten(0, 1)[at]
        if missing := [tap for tap in cut.see if tap not in seen]:
            raise CutNotRunError(
                f"the cut of {name!r} at decoder layer {cut.at.layer} did not get to see {missing[0]}."
            )
        reduction: Reduction = cut.reduce(seen, layout)
        if reduction.soft is not None:
            self.soften(name, cut, reduction, at)
            return hidden
        keep = reduction.keep & layout.alive
        counts = keep.sum(1).tolist() if reduction.counts is None else reduction.counts
        self.cuts.append(CutTrace(cut.at.layer, name, cut.positions, keep, reduction.merge, reduction.scores))
        if counts == layout.alive_counts:
            return hidden  # a budget of all tokens is the exact identity
        if reduction.merge is not None:
            hidden = merge_tokens(hidden, at, layout.alive, reduction.merge, keep)
        dropped = [0] * len(sequence.lengths)
        for row, before, after in zip(layout.sample, layout.alive_counts, counts, strict=True):
            dropped[row] += before - after
        # padding entries of the layout point at column 0 or repeat a column: add, don't overwrite
        gone = (layout.alive & ~keep).long()
        drop = gone.new_zeros(sequence.columns.numel()).scatter_add(0, at.flatten(), gone.flatten())
        drop = drop.view_as(sequence.columns) > 0
        hidden, self.sequence = sequence.shorten(hidden, drop, dropped, cut.positions, self.rotary_emb)
        self.layout = replace(layout, alive=keep, alive_counts=counts, alive_patches=reduction.patches)
        if cut.at.layer == 0:
            self.layout = replace(self.layout, entered=counts, entered_patches=reduction.patches)
        return hidden

    def soften(self, name: str, cut: Cut, reduction: Reduction, at: torch.Tensor) -> None:
        """Weaken tokens for all later layers instead of removing them."""
        layout, sequence = self.layout, self.sequence
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
        output.last_hidden_state = self.sequence.expand(output.last_hidden_state)
        if output.hidden_states is not None:
            # entry 0 is the input of layer 0 as that layer got it, entry i the output of layer i - 1
            made_by = [self.by_layer[0], *self.by_layer[:-1]]
            states = [
                h if h is None else sequence.expand(h)
                for h, sequence in zip(output.hidden_states, made_by, strict=False)
            ]
            output.hidden_states = (*states, output.last_hidden_state)
        if output.past_key_values is not None:
            setattr(output.past_key_values, SEGMENTS, self.segments)
        self.plan.trace = Trace(
            grids=list(self.layout.grids),
            sample=self.layout.sample,
            cuts=self.cuts,
            prompt_length=self.sequence.prompt,
            prompt_lengths=self.prompt_lengths,
            kv_lengths=[s.length for s in self.by_layer],
            row_lengths=[s.lengths for s in self.by_layer],
        )


# --- decode ---------------------------------------------------------------------------------------------------------


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


# --- hooks on the model ---------------------------------------------------------------------------------------------


@dataclass
class BeforeModel:
    """Pre-hook of the inner model: starts a prefill frame, or hands decode its state."""

    plan: Plan

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        kwargs = dict(zip(names, args, strict=False)) | kwargs
        outputs, pixels = kwargs.get("mm_encoder_outputs"), kwargs.get("pixel_values")
        images = outputs is not None and outputs.get("image") is not None
        if images or (pixels is not None and len(pixels) > 0):
            return self.prefill(module, kwargs) if self.plan.enabled else None
        cache = kwargs.get("past_key_values")
        segments = getattr(cache, SEGMENTS, None)
        if segments and cache.get_seq_length() == 0:  # the cache was reset and starts anew
            delattr(cache, SEGMENTS)
            return None
        return self.decode(module, kwargs, segments) if segments else None

    def prefill(self, module: nn.Module, kwargs: dict) -> tuple[tuple, dict]:
        cache, input_ids = kwargs.get("past_key_values"), kwargs.get("input_ids")
        if input_ids is None:
            raise UnsupportedError("a pruned call with images needs input_ids (inputs_embeds hide the placeholders).")
        if cache is not None and cache.get_seq_length() > 0:
            raise UnsupportedError("images on a cache that already holds tokens are not supported yet.")
        config = self.plan.family.language_model(module).config
        if kwargs.get("output_attentions", config.output_attentions):
            raise UnsupportedError(
                "output_attentions of a pruned forward is not supported: layers see different sequences. "
                "Use `with handle.disabled():` for the plain model's attentions."
            )
        if any(kind in (kwargs.get("mm_encoder_outputs") or {}) for kind in ("video",)):
            raise UnsupportedError("video input is not supported yet.")
        if kwargs.get("pixel_values") is not None:
            encode = module.get_image_features
            wanted = inspect.signature(encode).parameters
            inputs = {k: kwargs.pop(k) for k in list(kwargs) if k in wanted and k != "kwargs"}
            inputs = {k: v for k, v in inputs.items() if v is not None}
            kwargs["mm_encoder_outputs"] = {"image": encode(**inputs, return_dict=True)}
        features = kwargs["mm_encoder_outputs"]["image"]
        frame = Prefill(self.plan, module, input_ids, kwargs.get("attention_mask"), features)
        return (), kwargs | {FRAME: frame}

    def decode(self, module: nn.Module, kwargs: dict, segments: list[Segment]) -> tuple[tuple, dict]:
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
            rotary_emb = self.plan.family.language_model(module).rotary_emb
            kwargs[FRAME] = Decode(segments, rotary_emb, positions, new)
        if first.first == 0:
            kwargs["attention_mask"] = decode_mask(first, cache, 0, batch, queries, new, tokens.device)
            positions = positions if first.shift is None else positions - first.shift
        kwargs["position_ids"] = positions
        return (), kwargs


@dataclass
class AfterBlock:
    """Hook of an attention or feed-forward block that a tap watches; the second of the two ends the watch."""

    index: int
    watching: Watch
    last: bool

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if (frame := self.watching.frame(self.last)) is not None:
            before = args[0] if args else kwargs["hidden_states"]
            frame.watch(self.index, before, output[0] if isinstance(output, tuple) else output)


@dataclass
class BeforeLayer:
    """Pre-hook of a decoder layer: takes the frame out and lets it act."""

    index: int
    watching: Watch | None = None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if FRAME not in kwargs:
            return None
        frame = kwargs.pop(FRAME)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        hidden, kwargs = frame.enter(self.index, module, hidden, kwargs)
        if self.watching is not None and isinstance(frame, Prefill):
            self.watching.begin(frame)
        return (hidden, *args[1:]), kwargs


@dataclass
class AfterLanguageModel:
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if isinstance(frame := kwargs.get(FRAME), Prefill):
            frame.finish(output)


@dataclass
class AfterModel:
    """Hook of the inner model: notices a frame that was lost on the way to the language model."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        frame = kwargs.get(FRAME)
        if isinstance(frame, Prefill) and not frame.finished:
            frame.check()
            raise CutNotRunError(
                "this call carried images, and the frame of its cuts did not reach the language model."
            )


@dataclass
class CheckLabels:
    """Pre-hook of the model with a head: a loss on a visual placeholder has no meaning once tokens are gone."""

    plan: Plan

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        labels, input_ids = kwargs.get("labels"), kwargs.get("input_ids", args[0] if args else None)
        if labels is None or input_ids is None or not self.plan.enabled:
            return
        if ((input_ids == self.plan.family.image_token(self.plan.family.inner(module))) & (labels != -100)).any():
            raise ValueError("labels on visual placeholders must be -100: pruned tokens cannot carry a loss.")


HOOKS = (
    AfterBlock,
    AfterKeys,
    BeforeTower,
    BeforeTowerLayer,
    AfterTower,
    BeforeModel,
    BeforeLayer,
    AfterLanguageModel,
    AfterModel,
    CheckLabels,
)


def is_hook(hook: Callable) -> bool:
    """Whether a hook found on a module is one of ours, on copies of patched models too."""
    return isinstance(hook, HOOKS)


def install(model: nn.Module, plan: Plan) -> None:
    """Put the hooks of `plan` on a model and nothing else, but for `RememberSizes` where a family needs sizes."""
    family, inner = plan.family, plan.family.inner(model)

    def before(module: nn.Module, hook: Callable) -> None:
        module.register_forward_pre_hook(hook, with_kwargs=True)

    if plan.tower_taps or plan.tower_cuts or plan.pixel_cuts:
        tower = family.tower(inner)
        before(tower, BeforeTower(plan))
        for index, layer in enumerate(family.tower_layers(inner)):
            watching = Watch() if index in plan.key_layers else None
            before(layer, BeforeTowerLayer(index, watching))
            if watching is not None:
                layer.self_attn.k_proj.register_forward_hook(AfterKeys(index, watching, layer.self_attn.num_heads))
        tower.register_forward_hook(AfterTower(), with_kwargs=True)
    if family.needs_sizes:
        inner.get_image_features = RememberSizes(inner)
    before(inner, BeforeModel(plan))
    inner.register_forward_hook(AfterModel(), with_kwargs=True)
    for index, layer in enumerate(family.decoder_layers(inner)):
        watching = Watch() if index in plan.block_layers else None
        before(layer, BeforeLayer(index, watching))
        if watching is not None:
            layer.self_attn.register_forward_hook(AfterBlock(index, watching, last=False), with_kwargs=True)
            layer.mlp.register_forward_hook(AfterBlock(index, watching, last=True), with_kwargs=True)
    family.language_model(inner).register_forward_hook(AfterLanguageModel(), with_kwargs=True)
    if model is not inner:
        before(model, CheckLabels(plan))


def remove(model: nn.Module) -> None:
    """Take every hook of ours off a model; nothing happens where there is none."""
    for module in model.modules():
        for hooks, flags in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key in [k for k, hook in hooks.items() if is_hook(hook)]:
                del hooks[key]
                flags.pop(key, None)
        if isinstance(module.__dict__.get("get_image_features"), RememberSizes):
            del module.get_image_features
