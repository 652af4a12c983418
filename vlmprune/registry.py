"""Methods by name: registered in this process or published by other packages through an entry point."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from vlmprune.errors import did_you_mean

if TYPE_CHECKING:
    from vlmprune.methods.base import Method

__all__ = ["ENTRY_POINTS", "build", "find", "names", "register"]

ENTRY_POINTS = "vlmprune.methods"
_methods: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[type[Method]], type[Method]]:
    """Class decorator: make a method known under `name`.

    Raises:
        ValueError: another class has the name already.
    """

    def add(cls: type[Method]) -> type[Method]:
        known = _methods.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"a method named {name!r} is registered already: {known.__module__}.{known.__qualname__}.")
        cls.name = name
        _methods[name] = cls
        return cls

    return add


def names() -> list[str]:
    """All known method names, sorted; those of other packages included, without importing these."""
    import_module("vlmprune.methods")
    return sorted({*_methods, *(point.name for point in metadata.entry_points(group=ENTRY_POINTS))})


def find(name: str) -> type[Method]:
    """The class registered as `name`.

    Raises:
        ValueError: nothing is registered under that name; the message suggests the closest.
    """
    import_module("vlmprune.methods")
    if name not in _methods:
        for point in metadata.entry_points(group=ENTRY_POINTS, name=name):
            register(name)(point.load())
    if name not in _methods:
        raise ValueError(f"unknown method {name!r}.{did_you_mean(name, names())} Known: {', '.join(names())}.")
    return _methods[name]


def options(cls: type[Method]) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if f.init]


def required(cls: type[Method]) -> list[str]:
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(cls) if f.init and f.default is missing and f.default_factory is missing]


def build(method: str | Method | Iterable[str | Method], given: dict[str, Any]) -> list[Method]:
    """Make method objects of what a user passed to `patch`.

    With several methods, every option goes to the one named method that has it; an option that several have must be
    given by passing method objects instead of names.

    Raises:
        TypeError: something that is no method, an option with a method object, or a required option missing.
        ValueError: an unknown method or option (with a suggestion), or an ambiguous one.
    """
    from vlmprune.methods.base import Method

    parts = [method] if isinstance(method, str | Method | type) else method
    if not isinstance(parts, Iterable):
        raise TypeError(f"method must be a name, a method object or a list of them, not {type(method).__name__}.")
    parts = list(parts)
    if not parts:
        raise ValueError("the list of methods is empty.")
    for part in parts:
        if isinstance(part, type) and issubclass(part, Method):
            raise TypeError(
                f"method {part.__name__} is a class: pass an object, {part.__name__}(keep=64), or its name."
            )
        if not isinstance(part, str | Method):
            raise TypeError(f"method must be a name, a method object or a list of them, not {type(part).__name__}.")
    classes = [find(part) if isinstance(part, str) else None for part in parts]
    share: list[dict[str, Any]] = [{} for _ in parts]
    for option, value in given.items():
        takers = [i for i, cls in enumerate(classes) if cls is not None and option in options(cls)]
        if not any(cls is not None for cls in classes):
            raise TypeError(f"{option}= cannot be combined with a method object: set it when making the object.")
        if not takers:
            known = sorted({o for cls in classes if cls is not None for o in options(cls)})
            who = " and ".join(repr(part) for part in parts if isinstance(part, str))
            if why := next((cls.refuses[option] for cls in classes if cls and option in cls.refuses), None):
                raise ValueError(f"{who} refuses {option}={value!r}: {why}")
            raise ValueError(
                f"{who} has no option {option!r}.{did_you_mean(option, known)} Options: {', '.join(known)}."
            )
        if len(takers) > 1:
            who = ", ".join(repr(parts[i]) for i in takers)
            raise ValueError(f"{option}= could mean any of {who}: pass method objects, such as [{example(classes)}].")
        share[takers[0]][option] = value
    made = []
    for part, cls, mine in zip(parts, classes, share, strict=True):
        if cls is not None:
            if missing := [o for o in required(cls) if o not in mine]:
                raise TypeError(f"method {part!r} needs {missing[0]}=.")
            part = cls(**mine)
        made.append(part)
    return made


def example(classes: list[type[Method] | None]) -> str:
    return ", ".join(f"{cls.__name__}(keep=64)" for cls in classes if cls is not None)
