"""Kinds of values in a YAML file, as pydantic checks them; nothing is converted: `true` is no 1 and 1 no text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, Strict, ValidationError, WrapValidator

from vlmprune.yamls.told import about, must_be

__all__ = ["AnyText", "Many", "Number", "Plain", "Positive", "Some", "Switch", "Text", "Whole", "kind"]

T = TypeVar("T")


def kind(wanted: str, known: Iterable[str] = ()) -> WrapValidator:
    """Says what the value must be, in place of pydantic's words."""

    def check(value: Any, inner: Any) -> Any:
        try:
            return inner(value)
        except ValidationError:
            raise must_be(wanted, value, known) from None

    return WrapValidator(check)


AnyText = Annotated[str, Strict(), kind("text")]
Text = Annotated[str, Strict(), Field(pattern=r"\S"), kind("text")]
Switch = Annotated[bool, Strict(), kind("true or false")]
Whole = Annotated[int, Strict(), Field(ge=0), kind("a whole number of at least 0")]
Positive = Annotated[int, Strict(), Field(ge=1), kind("a whole number of at least 1")]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False), kind("a number")]


# Lists


def several(value: Any) -> tuple[Any, ...]:
    """A list, or one value alone."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def some(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """At least one."""
    if not values:
        raise about("is an empty list.")
    return values


Many = Annotated[tuple[T, ...], BeforeValidator(several)]
Some = Annotated[Many[T], AfterValidator(some)]


# Values that methods give a meaning to


def plain(value: Any) -> Any:
    """An option of a method or of generation: a scalar, or a list of scalars."""
    if any(isinstance(x, dict | list) for x in (value if isinstance(value, list) else [value])):
        raise must_be("a number, text, true, false or null, or a list of them", value)
    if value == "None":
        raise about("is the text 'None' in YAML: write null for no value.")
    return value


Plain = Annotated[Any, AfterValidator(plain)]
