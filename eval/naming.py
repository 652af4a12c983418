"""Methods and their options as text says them: on a command line, in `--model_args`, in a configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vlmprune import registry
from vlmprune.errors import did_you_mean
from vlmprune.methods.base import Method

__all__ = ["NONE", "budget_text", "methods_of", "typed"]

NONE = "none"  # the method that leaves the model as it is
PYTHON = {"True": True, "False": False, "None": None}


def budget_text(budget: Mapping[str, Any] | None) -> str:
    """`keep 0.25`; empty for none."""
    return ", ".join(f"{word} {amount}" for word, amount in (budget or {}).items())


def typed(value: Any) -> Any:
    """The value that a text means: `-2`, `0.1`, `true`, `[7, 9, 12]`, or the text itself.

    lmms-eval has turned some texts into numbers already, and `-2` into -2.0.
    """
    if isinstance(value, float) and value < 0 and value.is_integer():
        return int(value)
    if isinstance(value, str):
        if value in PYTHON:
            return PYTHON[value]
        try:
            value = json.loads(value)
        except ValueError:
            return value
    return tuple(value) if isinstance(value, list) else value


def methods_of(method: str, options: dict[str, Any]) -> list[Method]:
    """Make the method objects that a name and options mean.

    Args:
        method: a name, `none`, or names joined by `+`, which run one after the other.
        options: an option goes to the one method that has it; `globalcom2.keep` names the method. None means not given.

    Returns:
        The methods in order; none of them for `none`.

    Raises:
        TypeError, ValueError: an unknown method or option (with a suggestion), a bad value, a missing budget, or an
            option that several of the methods have.
    """
    options = {key: value for key, value in options.items() if value is not None}
    names = [name.strip() for name in method.split("+")]
    if names == [NONE]:
        if options:
            given = ", ".join(f"{key}={value}" for key, value in options.items())
            raise ValueError(f"method 'none' is the whole model and takes no options, and here is {given}.")
        return []
    for name in names:
        if name == NONE:
            raise ValueError(f"method {method!r}: 'none' is the whole model and cannot be combined.")
        if name not in registry.names():
            known = [NONE, *registry.names()]
            raise ValueError(f"unknown method {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    if len(set(names)) < len(names):
        raise ValueError(f"method {method!r} names a method twice.")
    shares: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in options.items():
        name, dot, option = key.rpartition(".")
        if dot and name not in shares:
            raise ValueError(f"option {key!r}: {name!r} is not one of the methods.{did_you_mean(name, names)}")
        takers = [name] if dot else [n for n in names if option in registry.options(registry.find(n))]
        if len(takers) > 1:
            ways = " or ".join(f"{n}.{option}=" for n in takers)
            raise ValueError(f"{option}= could mean any of {', '.join(takers)}: write {ways}.")
        if not takers:
            registry.build(names, {option: value})  # which knows how to say that there is no such option
        shares[takers[0]][option] = value
    return [registry.build(name, share)[0] for name, share in shares.items()]
