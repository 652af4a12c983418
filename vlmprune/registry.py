"""Methods by name: registered in this process or published by other packages through an entry point."""

from __future__ import annotations

import dataclasses
from importlib import metadata
from typing import TYPE_CHECKING

from vlmprune.errors import did_you_mean

if TYPE_CHECKING:
    from vlmprune.methods.base import Method

__all__ = ["ENTRY_POINTS", "find", "names", "options", "registered", "required"]

ENTRY_POINTS = "vlmprune.methods"


def registered() -> dict[str, type[Method]]:
    """The methods registered in this process, ours above all, by name; to be read only."""
    from vlmprune.methods.base import REGISTERED  # late: torch takes seconds, and `vlmprune --help` needs no method

    return REGISTERED


def names() -> list[str]:
    """All known method names, sorted; those of other packages included, without importing these."""
    return sorted({*registered(), *(point.name for point in metadata.entry_points(group=ENTRY_POINTS))})


def find(name: str) -> type[Method]:
    """The class registered as `name`.

    Raises:
        ValueError: nothing is registered under that name (the message suggests the closest), or the package that
            offers it cannot be imported.
    """
    if name not in registered():
        from vlmprune.methods.base import register

        for point in metadata.entry_points(group=ENTRY_POINTS, name=name):
            try:
                found = point.load()
            except Exception as error:  # another package's code: whatever it raises
                told = " ".join(str(error).split())
                raise ValueError(f"method {name!r} cannot be loaded: {type(error).__name__}: {told}") from error
            register(name)(found)
    if name not in registered():
        raise ValueError(f"unknown method {name!r}.{did_you_mean(name, names())} Known: {', '.join(names())}.")
    return registered()[name]


def options(cls: type[Method]) -> list[str]:
    """The names of a method's options."""
    return [f.name for f in dataclasses.fields(cls) if f.init]


def required(cls: type[Method]) -> list[str]:
    """Those without a default."""
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(cls) if f.init and f.default is missing and f.default_factory is missing]
