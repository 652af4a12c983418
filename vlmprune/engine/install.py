"""Putting a plan's hooks on a model and taking them off: all of them or none, and nobody else's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from vlmprune import kernels
from vlmprune.engine.encode import Encode, encoder
from vlmprune.engine.hooks import (
    AfterBlock,
    AfterLanguageModel,
    AfterModel,
    BeforeHead,
    BeforeLanguageModel,
    BeforeLayer,
    BeforeModel,
)
from vlmprune.engine.plan import Hook, Plan
from vlmprune.engine.thin import AfterMerger
from vlmprune.engine.tower import (
    AfterProjection,
    AfterTower,
    AfterTowerAttention,
    BeforeTower,
    BeforeTowerAttention,
    BeforeTowerLayer,
)
from vlmprune.engine.watch import Watch
from vlmprune.patches.base import Bound
from vlmprune.patches.language_models import decoder_layer
from vlmprune.patches.towers import tower_layer

__all__ = ["current", "install", "is_hook", "remove", "swap", "warm_up"]


def warm_up(model: nn.Module) -> None:
    """Load the kernels now (see `kernels.warm_up`) on the devices that hold the model's weights."""
    kernels.warm_up({weight.device for weight in model.parameters()}, model.dtype)


def is_hook(hook: Callable) -> bool:
    """Whether a hook found on a module is one of ours, on copies of patched models too."""
    return isinstance(hook, Hook)


def swap(model: nn.Module, plan: Plan | None) -> None:
    """Put a plan on a model in the place of the one that is there, or take that off; if this fails, it is back.

    Raises:
        RuntimeError: the model is the inner part of a patched one.
    """
    before = current(model)
    try:
        remove(model)
        if plan is not None:
            install(model, plan)
    except BaseException:
        if before is not None:
            take_off(model, [before])
            install(model, before)
        raise


def install(model: nn.Module, plan: Plan) -> None:
    """Put the hooks of `plan` on a model and nothing else, but for `Bound` attributes; all of it, or nothing.

    A plan that was on the inner model alone goes back there.
    """
    inner = plan.family.inner(model)
    if plan.head == "":
        model = inner
    try:
        if plan.in_tower:
            hook_towers(inner, plan)
        bind_encoders(inner, plan)
        plan.family.bind(model, plan)
        hook_language_model(inner, plan)
        plan.head = "" if model is inner else type(model).__name__
        if model is not inner:
            model.register_forward_pre_hook(BeforeHead(plan), with_kwargs=True)
    except BaseException:
        take_off(model, [plan])
        raise


def bind_encoders(inner: nn.Module, plan: Plan) -> None:
    """Put `Encode` before the encoders of an inner model that have something to be told or noted."""
    for modality in plan.family.modalities:
        if Encode.wanted(plan, modality) and hasattr(inner, encoder(modality)):
            setattr(inner, encoder(modality), Encode(inner, plan, modality))


def hook_towers(inner: nn.Module, plan: Plan) -> None:
    """Put the hooks of `plan` on the vision towers, their layers and their mergers."""
    for tower in plan.family.towers(inner):
        through = Watch() if plan.patch_cuts or not plan.family.handing else None
        handed = None if plan.family.handing else through
        shown = () if through is None else (through,)
        tower.register_forward_pre_hook(BeforeTower(plan, watching=shown), with_kwargs=True)
        for index, layer in enumerate(plan.family.tower_layers(tower)):
            hook_tower_layer(layer, plan, index, handed)
        for merger in plan.family.mergers(tower) if plan.patch_cuts else ():
            merger.register_forward_hook(AfterMerger(plan, through))
        tower.register_forward_hook(AfterTower(plan, through), with_kwargs=True)


def hook_tower_layer(layer: nn.Module, plan: Plan, index: int, handed: Watch | None) -> None:
    """Put the hooks of `plan` on a layer of a tower; `handed` has the call's frame where no keyword brings it."""
    names, inside = plan.projected(index), index in plan.inside_layers
    before = BeforeTowerLayer(plan, index, handed, names, watching=tuple(Watch() for _ in names))
    layer.register_forward_pre_hook(before, with_kwargs=True)
    if not names and not inside and all(tap.layer != index for tap in plan.measured):
        return
    kind = tower_layer(layer)  # one that is not known is refused here, and not in the first call
    for name, watch in zip(names, before.watching, strict=True):
        after = AfterProjection(plan, index, watch, name, kind.attention.num_heads)
        getattr(kind, f"{name}_projection").register_forward_hook(after)
    if inside:
        between = Watch()
        kind.attention.register_forward_pre_hook(BeforeTowerAttention(plan, watching=(between,)), with_kwargs=True)
        kind.attention.register_forward_hook(AfterTowerAttention(plan, between))


def hook_language_model(inner: nn.Module, plan: Plan) -> None:
    """Put the hooks of `plan` on the inner model, its language model and decoder layers."""
    inner.register_forward_pre_hook(BeforeModel(plan), with_kwargs=True)
    for index, layer in enumerate(plan.family.decoder_layers(inner)):
        watching = (Watch(),) if index in plan.block_layers else ()
        if index in plan.decoder_tap_layers:
            decoder_layer(layer)  # as in towers
        layer.register_forward_pre_hook(BeforeLayer(plan, index, watching=watching), with_kwargs=True)
        for watch in watching:
            kind = decoder_layer(layer)
            for block, last in ((kind.attention, False), (kind.feed_forward, True)):
                block.register_forward_hook(AfterBlock(plan, index, watch, last), with_kwargs=True)
    if plan.family.axes > 1 or plan.family.injected:
        plan.family.language_model(inner).register_forward_pre_hook(BeforeLanguageModel(plan), with_kwargs=True)
    # in this order: inner and language model may be one module
    plan.family.language_model(inner).register_forward_hook(AfterLanguageModel(plan), with_kwargs=True)
    inner.register_forward_hook(AfterModel(plan), with_kwargs=True)


def owned(model: nn.Module) -> list[Plan]:
    """The plans that are installed on a model, or on models inside a container.

    What a module shares with another, patched model is that one's.

    Raises:
        RuntimeError: the model is, or has, the inner part of a patched one.
    """
    found, heads = starts(model, BeforeModel), {id(plan) for _, plan in starts(model, BeforeHead)}
    for module, plan in found:
        if plan.head and id(plan) not in heads:
            raise RuntimeError(
                f"this {type(module).__name__} is the inner part of a {plan.head} that is patched: patch and unpatch "
                f"that {plan.head}."
            )
    return [plan for _, plan in found]


def starts(model: nn.Module, kind: type[Hook]) -> list[tuple[nn.Module, Plan]]:
    """The modules of a model that have a pre-hook of a kind, and its plan."""
    hooks = [(module, hook) for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return [(module, hook.plan) for module, hook in hooks if isinstance(hook, kind)]


def current(model: nn.Module) -> Plan | None:
    """The plan that is installed on a model, or None."""
    return next(iter(owned(model)), None)


def remove(model: nn.Module) -> None:
    """Take every hook of its own patch off a model; nothing happens where there is none."""
    take_off(model, owned(model))


def made_for(plans: list[Plan], thing: Any) -> bool:
    """Whether something on a module is a hook or an attribute of ours, and of one of these plans."""
    return isinstance(thing, Hook | Bound) and any(thing.plan is plan for plan in plans)


def take_off(model: nn.Module, plans: list[Plan]) -> None:
    """Take every hook and attribute of some plans off a model."""
    for module in model.modules():
        for hooks, flags in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key in [k for k, hook in hooks.items() if made_for(plans, hook)]:
                del hooks[key]
                flags.pop(key, None)
        for name in [name for name, value in vars(module).items() if made_for(plans, value)]:
            delattr(module, name)
