"""The hooks, and the frame of one call that rides through them in the keyword arguments.

Life of a pruned prefill: `BeforeModel` makes a `Prefill` frame and puts it into the keyword arguments; the host hands
these to every decoder layer, where `BeforeLayer` takes it out, measures taps and cuts; `AfterLanguageModel` restores
lengths, leaves the decode state on the cache (a list of `Segment`s) and files the trace; `AfterModel` notices a frame
that was lost. `BeforeHead`, on the model around the inner one, hands on what that would not get. `BeforeTower`,
`BeforeTowerLayer` and `AfterTower` do the same inside the vision tower.

Life of a later call without images on that cache: `BeforeModel` turns its arguments to what the segments say; where
layers hold different lengths, a `Decode` frame rides along and `BeforeLayer` lets it do so for every layer. A later
call with images is a prefill again, behind the segments. Nothing is ambient: threads and interleaved generations
cannot mix.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlmprune.engine.census import check_mask
from vlmprune.engine.channels import FRAME, NOTES, SEEN, SEGMENTS, SIZES
from vlmprune.engine.decode import catch_up, held, length_of, resume, rolled_back
from vlmprune.engine.placement import loaded
from vlmprune.engine.plan import Plan
from vlmprune.engine.prefill import Prefill
from vlmprune.engine.sequence import Segment
from vlmprune.engine.tower import (
    AfterKeys,
    AfterTower,
    BeforeTower,
    BeforeTowerLayer,
    RememberSizes,
    check_fixed,
    encoder,
)
from vlmprune.engine.watch import Watch
from vlmprune.errors import CutNotRunError, UnsupportedError
from vlmprune.patches import Family
from vlmprune.patches.base import Bound
from vlmprune.patches.language_models import decoder_layer
from vlmprune.patches.towers import tower_layer

__all__ = ["Plan", "install", "is_hook", "remove"]


@dataclass
class BeforeModel:
    """Pre-hook of the inner model: starts a prefill frame, or hands decode its state."""

    plan: Plan

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        kwargs, family = dict(zip(names, args, strict=False)) | kwargs, self.plan.family
        if (notes := kwargs.pop(NOTES, None)) is not None:
            notes.restore(kwargs.get("mm_encoder_outputs"))
        opened = family.open(kwargs)
        changed = self.arrive(module, opened, 0 if notes is None else notes.guesses)
        if changed is None and opened is kwargs:
            return None
        return (), family.close(opened if changed is None else changed)

    def arrive(self, module: nn.Module, kwargs: dict, guesses: int) -> dict | None:
        """The arguments to run with instead, or None to leave the call alone."""
        pictured = self.plan.enabled and (
            brings_features(kwargs) or any(given_pixels(kwargs, modality) for modality in PIXELS)
        )
        cache = kwargs.get("past_key_values")
        segments = getattr(cache, SEGMENTS, None) or []
        if not pictured and not segments:
            return None
        length = length_of(kwargs, pictured)
        segments = rolled_back(cache, segments, length)
        if pictured:
            return self.prefill(module, kwargs, guesses, segments, length)
        if not segments:
            return None
        kwargs = catch_up(kwargs, segments, length)
        return resume(self.plan.family.language_model(module), kwargs, segments, length)

    def prefill(self, module: nn.Module, kwargs: dict, guesses: int, segments: list[Segment], length: int) -> dict:
        check_fixed(self.plan.family, module.config, kwargs)
        if kwargs.get("input_ids") is None:
            raise UnsupportedError("a pruned call with images needs input_ids (inputs_embeds hide the placeholders).")
        language_model = self.plan.family.language_model(module)
        if kwargs.get("output_attentions", language_model.config.output_attentions):
            raise UnsupportedError(
                "output_attentions of a pruned forward is not supported: layers see different sequences. "
                "Use `with handle.disabled():` for the plain model's attentions."
            )
        check_mask(kwargs.get("attention_mask"), kwargs.get("past_key_values"))
        kwargs = catch_up(kwargs, segments, length)
        past, mask = held(kwargs, segments, length), kwargs.get("attention_mask")
        if segments:
            kwargs = resume(language_model, kwargs, segments, length)
        kwargs["mm_encoder_outputs"] = encoded = encode(module, kwargs, self.plan.family)
        positions = kwargs.get("position_ids") if mask is None else None
        frame = Prefill(self.plan, module, kwargs["input_ids"], mask, encoded, past, guesses, positions)
        return kwargs | {FRAME: frame}


def brings_features(kwargs: dict) -> bool:
    """Whether a call brings pictures that were encoded before it."""
    return any(output is not None for output in (kwargs.get("mm_encoder_outputs") or {}).values())


@dataclass
class Notes:
    """What `BeforeHead` tells `BeforeModel` of a call.

    Attributes:
        outputs: the encoders' own outputs, by modality. accelerate copies what it hands on, and copies lose what we
            noted on outputs; these it leaves alone.
        guesses: tokens at the end of the prompt that are none of it.
    """

    outputs: dict[str, Any]
    guesses: int

    def restore(self, copies: dict[str, Any] | None) -> None:
        """Put what was noted on the encoders' outputs on the ones that arrived."""
        for modality, output in self.outputs.items():
            for name in (SEEN, SIZES):
                if hasattr(output, name):
                    setattr(copies[modality], name, getattr(output, name))


def given_pixels(kwargs: dict, modality: str) -> bool:
    """Whether a call brings pictures of one kind."""
    return any(kwargs.get(name) is not None and len(kwargs[name]) > 0 for name in PIXELS[modality])


def encode(module: nn.Module, kwargs: dict, family: Family) -> dict[str, Any]:
    """Run the model's own encoders on what a call brings, as `generate` does; takes their arguments out of `kwargs`.

    Returns:
        The encoders' outputs by modality, those that the call brought ready included.
    """
    ready = {m: output for m, output in (kwargs.pop("mm_encoder_outputs", None) or {}).items() if output is not None}
    if strange := [m for m in ready if m not in family.modalities]:
        raise UnsupportedError(f"{strange[0]} input of {family.model_type} models is not supported.")
    used: set[str] = set()
    for modality in family.modalities:
        if given_pixels(kwargs, modality):
            if modality in ready:
                raise ValueError(f"give pixels or mm_encoder_outputs for input of kind {modality!r}, not both.")
            run = getattr(module, encoder(modality))
            if isinstance(run, RememberSizes) and run.module is not module:  # a replica has the original's
                run = RememberSizes(module, run.plan, modality)
            wanted = [name for name in inspect.signature(run).parameters if name in kwargs and name != "kwargs"]
            inputs = {name: kwargs[name] for name in wanted if kwargs[name] is not None}
            with loaded(module):
                ready[modality] = run(**inputs, return_dict=True)
            used.update(wanted)
    for name in used:
        del kwargs[name]
    return ready


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
        if self.watching is not None:
            self.watching.end()
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
class BeforeHead:
    """Pre-hook of the model with a head: reads the arguments that the inner model does not get, or gets copied."""

    plan: Plan

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not self.plan.enabled:
            return None
        self.check_labels(module, kwargs.get("labels"), kwargs.get("input_ids", args[0] if args else None))
        copied = brings_features(kwargs) and hasattr(module, "_hf_hook")
        outputs = {m: x for m, x in kwargs["mm_encoder_outputs"].items() if x is not None} if copied else {}
        guesses = guessed(kwargs)
        return (args, kwargs | {NOTES: Notes(outputs, guesses)}) if outputs or guesses else None

    def check_labels(self, module: nn.Module, labels: torch.Tensor | None, input_ids: torch.Tensor | None) -> None:
        """A loss on a visual placeholder has no meaning once tokens are gone."""
        if labels is None or input_ids is None:
            return
        family = self.plan.family
        tokens = [family.token(family.inner(module), modality) for modality in family.modalities]
        if any(((input_ids == token) & (labels != -100)).any() for token in tokens):
            raise ValueError("labels on visual placeholders must be -100: pruned tokens cannot carry a loss.")


def guessed(kwargs: dict) -> int:
    """How many tokens at the end of a prefill are guesses (of an assistant, of a prompt lookup) and no prompt.

    `generate` encodes pictures first, brings its cache, and asks for the logits of every guess and of the token before.
    """
    wanted = kwargs.get("logits_to_keep")
    if not isinstance(wanted, int) or kwargs.get("past_key_values") is None or not brings_features(kwargs):
        return 0
    return max(wanted - 1, 0)


PIXELS = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}

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
    BeforeHead,
)


def is_hook(hook: Callable) -> bool:
    """Whether a hook found on a module is one of ours, on copies of patched models too."""
    return isinstance(hook, HOOKS)


def install(model: nn.Module, plan: Plan) -> None:
    """Put the hooks of `plan` on a model and nothing else, but for the `Bound` attributes that some families need."""
    family, inner = plan.family, plan.family.inner(model)

    def before(module: nn.Module, hook: Callable) -> None:
        module.register_forward_pre_hook(hook, with_kwargs=True)

    if plan.tower_taps or plan.tower_cuts or plan.pixel_cuts:
        for tower in family.towers(inner):
            before(tower, BeforeTower(plan))
            for index, layer in enumerate(family.tower_layers(tower)):
                watching = Watch() if index in plan.key_layers else None
                before(layer, BeforeTowerLayer(index, watching))
                if watching is not None:
                    kind = tower_layer(layer)
                    kind.key_projection.register_forward_hook(AfterKeys(index, watching, kind.attention.num_heads))
            tower.register_forward_hook(AfterTower(), with_kwargs=True)
    for modality in family.modalities:
        if family.needs_sizes or modality == "video" or (plan.projector_cuts and hasattr(inner, encoder(modality))):
            setattr(inner, encoder(modality), RememberSizes(inner, plan, modality))
    family.bind(model, plan)
    before(inner, BeforeModel(plan))
    for index, layer in enumerate(family.decoder_layers(inner)):
        watching = Watch() if index in plan.block_layers else None
        before(layer, BeforeLayer(index, watching))
        if watching is not None:
            kind = decoder_layer(layer)
            kind.attention.register_forward_hook(AfterBlock(index, watching, last=False), with_kwargs=True)
            kind.feed_forward.register_forward_hook(AfterBlock(index, watching, last=True), with_kwargs=True)
    # in this order: inner and language model may be one module
    family.language_model(inner).register_forward_hook(AfterLanguageModel(), with_kwargs=True)
    inner.register_forward_hook(AfterModel(), with_kwargs=True)
    if model is not inner:
        before(model, BeforeHead(plan))


def installed(model: nn.Module, plan: Plan) -> bool:
    """Whether a plan's hooks are on a model."""
    hooks = plan.family.inner(model)._forward_pre_hooks.values()
    return any(isinstance(hook, BeforeModel) and hook.plan is plan for hook in hooks)


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
        for name in [name for name, value in vars(module).items() if isinstance(value, Bound)]:
            delattr(module, name)
