"""Methods by name: registered in this process or published by other packages through an entry point."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib import import_module, metadata
from typing import TYPE_CHECKING

from vlmprune.errors import did_you_mean

if TYPE_CHECKING:
    from vlmprune.methods.base import Method

__all__ = ["ENTRY_POINTS", "find", "names", "options", "register", "required"]

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
        ValueError: nothing is registered under that name (the message suggests the closest), or the package that
            offers it cannot be imported.
    """
    import_module("vlmprune.methods")
    if name not in _methods:
        for point in metadata.entry_points(group=ENTRY_POINTS, name=name):
            try:
                found = point.load()
            except Exception as error:  # another package's code: whatever it raises
                told = " ".join(str(error).split())
                raise ValueError(f"method {name!r} cannot be loaded: {type(error).__name__}: {told}") from error
            register(name)(found)
    if name not in _methods:
        raise ValueError(f"unknown method {name!r}.{did_you_mean(name, names())} Known: {', '.join(names())}.")
    return _methods[name]


def options(cls: type[Method]) -> list[str]:
    """The names of a method's options."""
    return [f.name for f in dataclasses.fields(cls) if f.init]


def required(cls: type[Method]) -> list[str]:
    """Those without a default."""
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(cls) if f.init and f.default is missing and f.default_factory is missing]
