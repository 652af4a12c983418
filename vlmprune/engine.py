"""The hooks, and the frame of one call that rides through them in the keyword arguments.

Life of a pruned prefill: `BeforeModel` makes a `Prefill` frame and puts it into the keyword arguments; the host hands
these to every decoder layer, where `BeforeLayer` takes it out, measures taps and cuts; `AfterLanguageModel` restores
lengths, leaves the decode state on the cache and files the trace. `BeforeTower`, `BeforeTowerLayer` and `AfterTower`
do the same inside the vision tower. Nothing is ambient: threads and interleaved generations cannot mix.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from vlmprune.decode import resume
from vlmprune.errors import CutNotRunError, UnsupportedError
from vlmprune.plan import FRAME, Plan
from vlmprune.prefill import Prefill
from vlmprune.sequence import SEGMENTS
from vlmprune.tower import AfterKeys, AfterTower, BeforeTower, BeforeTowerLayer, RememberSizes
from vlmprune.watch import Watch

__all__ = ["Plan", "install", "is_hook", "remove"]


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
            if self.plan.enabled:
                return self.prefill(module, kwargs)
            cache = kwargs.get("past_key_values")
            if not forget(cache) and getattr(cache, SEGMENTS, None):
                raise UnsupportedError(
                    "a plain call with images on a cache that holds a pruned prompt is not supported."
                )
            return None
        cache = kwargs.get("past_key_values")
        segments = getattr(cache, SEGMENTS, None)
        if not segments:
            return None
        # a reset cache starts anew; a static one is asked before prompts alone, since asking it waits for the device
        ids = kwargs.get("input_ids")
        step = ids is not None and ids.shape[1] == 1 and getattr(cache, "is_compileable", False)
        if not step and forget(cache):
            return None
        return (), resume(self.plan.family.language_model(module), kwargs, segments)

    def prefill(self, module: nn.Module, kwargs: dict) -> tuple[tuple, dict]:
        cache, input_ids = kwargs.get("past_key_values"), kwargs.get("input_ids")
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            if kwargs.get(name) is not None and kwargs[name] != getattr(module.config, name):
                raise UnsupportedError(
                    f"{name}={kwargs[name]!r} per call is not supported: set it in the model's config."
                )
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
class CheckLabels:
    """Pre-hook of the model with a head: a loss on a visual placeholder has no meaning once tokens are gone."""

    plan: Plan

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        labels, input_ids = kwargs.get("labels"), kwargs.get("input_ids", args[0] if args else None)
        if labels is None or input_ids is None or not self.plan.enabled:
            return
        if ((input_ids == self.plan.family.image_token(self.plan.family.inner(module))) & (labels != -100)).any():
            raise ValueError("labels on visual placeholders must be -100: pruned tokens cannot carry a loss.")


def forget(cache: Any) -> bool:
    """Take the decode state off a cache that was reset and starts anew; whether there was any."""
    if not getattr(cache, SEGMENTS, None) or cache.get_seq_length() > 0:
        return False
    delattr(cache, SEGMENTS)
    return True


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
        if isinstance(module.__dict__.get("get_image_features"), RememberSizes):
            del module.get_image_features
