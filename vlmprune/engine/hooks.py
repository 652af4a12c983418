"""The hooks, and the frame of one call that rides through them in the keyword arguments.

Life of a pruned prefill: `BeforeModel` makes a `Prefill` frame and puts it into the keyword arguments;
`BeforeLanguageModel` shows it what layers do not get; the host hands these arguments to every decoder layer, where
`BeforeLayer` takes it out, measures taps and cuts; `AfterLanguageModel` restores lengths, leaves the decode state on
the cache (a list of `Segment`s) and files the trace; `AfterModel` notices a frame that was lost. `BeforeHead`, on the
model around the inner one, hands on what that would not get. `BeforeTower`, `BeforeTowerLayer` and `AfterTower` do the
same inside the vision tower.

Life of a later call without images on that cache: `BeforeModel` turns its arguments to what the segments say, and lets
a `Decode` frame ride along, which does so for every layer where layers hold different lengths. A pruned cache that
reaches the layers without a frame raises. A later call with images is a prefill again, behind the segments. Nothing is
ambient: threads and interleaved generations cannot mix.
"""

from __future__ import annotations

import inspect
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from vlmprune.engine.axes import check_given, counted_again, places_of_turn, stand_on_axes
from vlmprune.engine.census import check_mask
from vlmprune.engine.channels import FRAME, NOTES, SEEN, SEGMENTS, SIZES
from vlmprune.engine.decode import held, length_of, resume, rolled_back
from vlmprune.engine.encode import PIXELS, check_fixed, encode, given_pixels, ready_outputs
from vlmprune.engine.plan import Hook, handed
from vlmprune.engine.prefill import Prefill
from vlmprune.engine.sequence import Segment
from vlmprune.engine.turn import catch_up
from vlmprune.engine.watch import Watch, Watched
from vlmprune.errors import CutNotRunError, UnsupportedError
from vlmprune.patches import Family
from vlmprune.patches.host import cache_of, in_words_of
from vlmprune.patches.language_models import counted

__all__ = [
    "AfterBlock",
    "AfterLanguageModel",
    "AfterModel",
    "BeforeHead",
    "BeforeLanguageModel",
    "BeforeLayer",
    "BeforeModel",
]


@dataclass
class BeforeModel(Hook):
    """Pre-hook of the inner model: starts a prefill frame, or hands decode its state."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        kwargs, family = dict(zip(names, args, strict=False)) | kwargs, self.plan.family
        notes = kwargs.pop(NOTES, Notes({}, 0))
        notes.restore(kwargs.get("mm_encoder_outputs"))
        opened = family.open(kwargs)
        changed = self.arrive(module, opened, notes.guesses)
        if changed is None and opened is kwargs:
            return None
        return (), family.close(opened if changed is None else changed)

    def arrive(self, module: nn.Module, kwargs: dict, guesses: int) -> dict | None:
        """The arguments to run with instead, or None to leave the call alone."""
        pictured = self.plan.enabled and brings_pictures(kwargs)
        cache = cache_of(kwargs)
        segments = getattr(cache, SEGMENTS, None) or []
        if not pictured and not segments:
            return None
        if segments and self.plan.facts.axes > 1:
            kwargs = counted_again(module, kwargs)
        length = length_of(kwargs, pictured)
        segments = rolled_back(cache, segments, length)
        if pictured:
            return self.prefill(module, kwargs, guesses, segments, length)
        if not segments:
            return None
        return resume(self.plan, module, catch_up(kwargs, segments, length, self.plan.family.origin), segments, length)

    def prefill(self, module: nn.Module, kwargs: dict, guesses: int, segments: list[Segment], length: int) -> dict:
        """The arguments of a call with pictures, its frame among them."""
        plan, family, on_axes = self.plan, self.plan.family, self.plan.facts.axes > 1
        check_call(family, module, kwargs, later=bool(segments))
        blocks = family.blocks(kwargs)
        if blocks is not None and length:
            raise UnsupportedError(
                f"pictures in a later turn are not supported on {family.model_type} models, whose pictures see all of "
                "themselves: begin a new conversation, or leave the patch out of it."
            )
        kwargs, stand = catch_up(kwargs, segments, length, family.origin), None
        past, mask = held(kwargs, segments, length), kwargs.get("attention_mask")
        if segments:
            kwargs = resume(plan, module, kwargs, segments, length)
        encoded = encode(module, kwargs, family)
        kwargs["mm_encoder_outputs"] = {modality: without_notes(output) for modality, output in encoded.items()}
        if on_axes and not segments:
            check_given(family, kwargs, encoded, length)
            stand = partial(stand_on_axes, kwargs, encoded)
        positions = counted(kwargs.get("position_ids")) if mask is None else None
        frame = Prefill(plan, module, kwargs["input_ids"], mask, encoded, past, guesses, positions, blocks, stand)
        if on_axes and segments:
            kwargs["position_ids"] = places_of_turn(family, module, kwargs, frame.layout, frame.census.real, past[0])
        return kwargs | {FRAME: frame}


def check_call(family: Family, module: nn.Module, kwargs: dict, later: bool) -> None:
    """Refuse a call with pictures that cannot be pruned; `later`: it goes on with a pruned conversation."""
    check_fixed(family, module.config, kwargs)
    if kwargs.get("input_ids") is None:
        raise UnsupportedError("a pruned call with images needs input_ids (inputs_embeds hide the placeholders).")
    if kwargs.get("output_attentions", family.language_model(module).config.output_attentions):
        raise UnsupportedError(
            "output_attentions of a pruned forward is not supported: layers see different sequences. "
            "Use `with handle.disabled():` for the plain model's attentions."
        )
    check_mask(kwargs.get("attention_mask"), cache_of(kwargs), kwargs["input_ids"], later)


def brings_pictures(kwargs: dict) -> bool:
    """Whether a call brings pictures, encoded or not."""
    return bool(ready_outputs(kwargs)) or any(given_pixels(kwargs, modality) for modality in PIXELS)


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
            for name, value in noted(output).items():
                setattr(copies[modality], name, value)


def noted(output: Any) -> dict[str, Any]:
    """What was noted on an encoder's output, by attribute."""
    return {name: getattr(output, name) for name in (SEEN, SIZES) if hasattr(output, name)}


def without_notes(output: Any) -> Any:
    """An encoder's output as the host makes it: since transformers 5.24 the model returns it with its own."""
    if not (notes := noted(output)):
        return output
    plain = copy(output)
    for name in notes:
        vars(plain).pop(name, None)
    return plain


@dataclass
class AfterBlock(Hook):
    """Hook of an attention or feed-forward block that a tap watches; the second of the two ends the watch."""

    index: int
    watching: Watch
    last: bool

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if (frame := self.watching.frame(self.last)) is not None:
            before, *_ = handed(args, kwargs)
            frame.watch(self.index, before, output[0] if isinstance(output, tuple) else output)


@dataclass
class BeforeLayer(Watched):
    """Pre-hook of a decoder layer: takes its own plan's frame out and lets it act."""

    index: int

    def start(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not self.owns(kwargs.get(FRAME)):
            if self.index == 0:
                check_plain(module, kwargs)
            return None
        frame = kwargs.pop(FRAME)
        hidden, rest, kwargs = handed(args, kwargs)
        hidden, kwargs = frame.enter(self.index, module, hidden, kwargs)
        if isinstance(frame, Prefill):
            self.show(frame)
        return (hidden, *rest), kwargs


def alone(layer: nn.Module) -> bool:
    """Whether a layer belongs to one patched model: the hook of another may have taken out that one's frame."""
    if torch.compiler.is_compiling():
        return True
    return sum(isinstance(hook, BeforeLayer) for hook in layer._forward_pre_hooks.values()) == 1


def check_plain(layer: nn.Module, kwargs: dict) -> None:
    """Refuse a pruned cache in a call that did not come by `BeforeModel`: its positions and masks would be wrong."""
    if FRAME not in kwargs and alone(layer) and getattr(cache_of(kwargs), SEGMENTS, None):
        raise UnsupportedError(
            "a pruned cache reached the decoder layers by a call that the patch did not see, and positions counted by "
            "it are wrong: call the patched model itself, not its language model, and let what is around it hand on "
            "all keyword arguments."
        )


@dataclass
class BeforeLanguageModel(Hook):
    """Pre-hook of the language model: shows a prefill what the layers do not get."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if isinstance(frame := kwargs.get(FRAME), Prefill) and self.owns(frame):
            return args, frame.begin(kwargs)
        return None


@dataclass
class AfterLanguageModel(Hook):
    """Hook of the language model: ends a prefill."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if isinstance(frame := kwargs.get(FRAME), Prefill) and self.owns(frame):
            frame.finish(output)


@dataclass
class AfterModel(Hook):
    """Hook of the inner model: notices a frame that was lost on the way to the language model."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        frame = kwargs.get(FRAME)
        if isinstance(frame, Prefill) and not frame.finished:
            frame.check()
            raise CutNotRunError(
                "this call carried images, and the frame of its cuts did not reach the language model."
            )


@dataclass
class BeforeHead(Hook):
    """Pre-hook of the model with a head: reads the arguments that the inner model does not get, or gets copied."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        known = in_words_of(module, kwargs)
        extra = self.extra(module, args, known) if self.plan.enabled else {}
        return (args, known | extra) if extra or known is not kwargs else None

    def extra(self, module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
        """What is to be handed on to the inner model."""
        self.check_labels(module, kwargs.get("labels"), kwargs.get("input_ids", args[0] if args else None))
        outputs = ready_outputs(kwargs) if hasattr(module, "_hf_hook") else {}
        guesses = guessed(kwargs)
        return {NOTES: Notes(outputs, guesses)} if outputs or guesses else {}

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
    if not isinstance(wanted, int) or cache_of(kwargs) is None or not ready_outputs(kwargs):
        return 0
    return max(wanted - 1, 0)
