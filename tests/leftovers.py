"""What a patch puts on a model, and that nothing of it is left."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from vlmprune.engine.hooks import AfterModel
from vlmprune.engine.install import is_hook
from vlmprune.engine.plan import Hook
from vlmprune.patches.base import Bound


def hooks_on(model: nn.Module) -> list[Callable]:
    """All hooks, whoever put them there."""
    return [
        hook
        for module in model.modules()
        for hooks in (
            module._forward_pre_hooks,
            module._forward_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
        for hook in hooks.values()
    ]


def ours(model: nn.Module) -> list[object]:
    """What a patch has put on a model."""
    return [
        thing
        for thing in (*hooks_on(model), *(value for module in model.modules() for value in vars(module).values()))
        if is_hook(thing) or isinstance(thing, Bound) or type(thing).__module__.startswith("vlmprune")
    ]


def assert_clean(model: nn.Module) -> None:
    assert not ours(model)
    for name, module in model.named_modules():
        assert "get_image_features" not in vars(module), name
        flags = {*module._forward_pre_hooks_with_kwargs, *module._forward_hooks_with_kwargs}
        assert flags <= {*module._forward_pre_hooks, *module._forward_hooks}, f"orphaned flags on {name}"


class AllButOne(type):
    def __instancecheck__(cls, thing: object) -> bool:
        return isinstance(thing, Hook) and not isinstance(thing, AfterModel)


class Forgetful(metaclass=AllButOne):
    """In the place of `engine.Hook` it makes unpatching leave hooks."""
