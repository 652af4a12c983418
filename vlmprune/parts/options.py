"""What a method's options may be: said by the types of its fields, and checked where one is made.

`Literal["rank", "row"]` is a choice and `bool` a switch. `Annotated[float, rule]` adds a rule, a function of the
option's name and value that returns what the field shall hold or raises; `Must` makes one from words. A `Range` among
them says where a search may look for the option.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache, partial
from itertools import chain
from math import inf, isfinite
from numbers import Real
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

__all__ = ["Layers", "Must", "Positive", "Range", "Ratios", "Seed", "Share", "Weight", "Whole", "ascending", "checked"]
__all__ += ["falling", "hints", "is_number", "is_whole", "layer_of", "ranges", "whole"]


@dataclass(frozen=True)
class Must:
    """A rule: what the value of an option must be.

    Attributes:
        be: for the error, as in "seed=-1 must be a whole number of at least 0."
        fits: tells whether a value is that.
    """

    be: str
    fits: Callable[[Any], bool]

    def __call__(self, name: str, value: Any) -> Any:
        """The value.

        Raises:
            ValueError: it does not fit.
        """
        if not self.fits(value):
            raise ValueError(f"{name}={value!r} must be {self.be}.")
        return value

    def or_none(self) -> Must:
        """The same rule where None is allowed too, for the error."""
        return self if "None" in self.be else Must(f"{self.be}, or None", self.fits)


@dataclass(frozen=True)
class Range:
    """Where `vlmprune tune --method` looks for a number: from `low` to `high`, evenly or evenly in its logarithm."""

    low: float
    high: float
    log: bool = False


def is_whole(value: object, least: int = 0, most: float = float("inf")) -> bool:
    """Whether `value` is a whole number from `least` to `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: object, least: float = 0, most: float = 1) -> bool:
    """Whether `value` is a finite number from `least` to `most`."""
    return isinstance(value, Real) and not isinstance(value, bool) and least <= value <= most and isfinite(value)


Whole = Annotated[int, Must("a whole number of at least 0", is_whole)]
Seed = Whole
Share = Annotated[float, Must("a number between 0 and 1", is_number)]
Weight = Annotated[float, Must("a number of at least 0", partial(is_number, most=inf))]
Positive = Annotated[float, Must("a number above 0", lambda value: is_number(value, most=inf) and value > 0)]


def whole(least: int, most: int) -> Must:
    """The rule of a whole number from `least` to `most`."""
    return Must(f"a whole number from {least} to {most}", partial(is_whole, least=least, most=most))


def layer_of(depth: int, least: int, most: int) -> Must:
    """The rule of the number of a layer, from `least` to `most`, of a tower or decoder of `depth` layers."""
    return Must(f"a layer from {least} to {most} (of {depth}, scaled)", partial(is_whole, least=least, most=most))


def ascending(most: int, of: int = 32) -> Callable[[str, Any], tuple[int, ...]]:
    """The rule of ascending layer numbers from 1 to `most`, of a decoder of `of` layers; a tuple of any sequence."""
    words = f"one or more ascending layer numbers from 1 to {most} (of a {of}-layer decoder; they scale with depth)"
    return partial(several, words, lambda layers: layers == sorted({*layers}), partial(is_whole, least=1, most=most))


def falling(least: float | None = None) -> Callable[[str, Any], tuple[float, ...]]:
    """The rule of ratios of which none is above the one before; a tuple of any sequence. 0 is one if it is `least`."""
    words = f"one or more numbers in {'(' if least is None else '['}0, 1] that do not grow"
    fits = is_number if least == 0 else lambda r: is_number(r) and r
    return partial(several, words, lambda ratios: ratios == sorted(ratios, reverse=True), fits)


def several(be: str, ordered: Callable[[list], bool], fits: Callable[[Any], Any], name: str, given: Any) -> tuple:
    """A sequence that is not empty, each entry of which fits, in order."""
    found = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else []
    if not found or not all(map(fits, found)) or not ordered(found):
        raise ValueError(f"{name}={given!r} must be {be}.")
    return tuple(found)


#: Of cuts in a decoder: behind which layers, and what each leaves of the tokens that entered.
Layers = Annotated[tuple[int, ...], ascending(31)]
Ratios = Annotated[tuple[float, ...], falling()]


@cache
def hints(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields, each read where the class that declares it stands.

    Raises:
        TypeError: a type that cannot be read, so that nobody could check the option.
    """
    found = {}
    for field in fields(cls):
        home = next(base for base in cls.__mro__ if field.name in inspect.get_annotations(base))
        told = SimpleNamespace(__annotations__={field.name: inspect.get_annotations(home)[field.name]})
        names = vars(sys.modules[home.__module__]) if home.__module__ in sys.modules else {}
        try:
            found |= get_type_hints(told, names, dict(vars(home)), include_extras=True)
        except NameError as error:
            raise TypeError(
                f"{cls.__name__}.{field.name}: its type, {field.type!r}, cannot be read ({error}), so no value of it "
                f"can be checked: import or define what it names in {home.__module__}, not in a function and not under "
                "TYPE_CHECKING."
            ) from None
    return found


def ranges(cls: type) -> dict[str, Range]:
    """The options of a method that a search may set, by name."""
    found = {name: [part for part in get_args(hint) if isinstance(part, Range)] for name, hint in hints(cls).items()}
    return {name: parts[0] for name, parts in found.items() if parts}


def checked(name: str, hint: Any, value: Any) -> Any:
    """What the field `name` of type `hint` shall hold: the value, a list as a tuple.

    Of a union, Literals and None are checked where there is nothing else in it, and otherwise the one other type that
    it has, or its tuple. What is no Literal, bool, tuple or rule is not checked.

    Raises:
        TypeError: a switch that is neither True nor False.
        ValueError: none of a Literal's values, or what a rule refuses.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return by_rules(name, parts, value)
    if origin in (Union, UnionType):
        return of_union(name, parts, value)
    if origin is Literal:
        return choice(name, value, parts)
    if origin is tuple and isinstance(value, list | tuple):
        types = parts[:1] * len(value) if parts[1:] == (...,) else parts
        known = [checked(f"{name}[{i}]", kind, v) for i, (kind, v) in enumerate(zip(types, value, strict=False))]
        return (*known, *value[len(known) :])
    if hint is bool and not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be True or False.")
    return value


def by_rules(name: str, parts: tuple, value: Any, optional: bool = False) -> Any:
    """`checked` of an Annotated's parts; None needs to keep no rule where the type has it, or what is `optional`."""
    value = checked(name, parts[0], value)
    optional = optional or NoneType in get_args(parts[0])
    if value is None and optional:
        return None
    for rule in filter(callable, parts[1:]):
        value = (rule.or_none() if optional and isinstance(rule, Must) else rule)(name, value)
    return value


def of_union(name: str, parts: tuple, value: Any) -> Any:
    """`checked` of a union's parts."""
    others = [part for part in parts if part is not NoneType]
    kinds = [get_origin(part) for part in others]
    nothing = (None,) if NoneType in parts else ()
    if set(kinds) == {Literal}:
        return choice(name, value, (*chain(*map(get_args, others)), *nothing))
    if value is None and nothing:
        return None
    if len(others) > 1 and kinds.count(tuple) != 1:
        return value
    only = others[kinds.index(tuple) if tuple in kinds else 0]
    if get_origin(only) is Annotated:
        return by_rules(name, get_args(only), value, optional=bool(nothing))
    return checked(name, only, value)


def choice(name: str, value: Any, allowed: tuple) -> Any:
    """One of the allowed values."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}.")
    return value
