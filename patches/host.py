"""What differs between the supported releases of transformers; it is read here and nowhere else.

transformers 5.24 renamed the argument and the output that hold the cache of keys and values: `past_key_values` became
`cache`. The old name goes on as an alias that models resolve at their door, so hooks in front of them may meet both.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from vlmprune._compat import check_transformers
from vlmprune.errors import UnsupportedError

check_transformers()  # before the first import of a part of it, which another release may not have

from transformers.modeling_outputs import BaseModelOutputWithPast  # noqa: E402

__all__ = ["CACHE", "cache_of", "in_words_of", "is_cache", "reads_pixel_values", "returned_cache", "with_cache"]

_OLD = "past_key_values"

#: The name of the cache among the arguments and outputs of models and decoder layers in this release.
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else _OLD


def reads_pixel_values(inner: nn.Module) -> bool:
    """Whether a model calls the pixels of images `pixel_values`: Video-LLaVA did not before transformers 5.23."""
    return "pixel_values" in inspect.signature(type(inner).get_image_features).parameters


def with_cache(cache: Any) -> dict[str, Any]:
    """The keyword argument that hands a cache to a model or a decoder layer."""
    return {CACHE: cache}


def cache_of(kwargs: Mapping[str, Any]) -> Any:
    """The cache among the keyword arguments of a model or a decoder layer, or None.

    Raises:
        UnsupportedError: there is one under a name that is not known.
    """
    for name in (CACHE, _OLD):
        if kwargs.get(name) is not None:
            return kwargs[name]
    return nothing_else(kwargs)


def returned_cache(output: Mapping[str, Any]) -> Any:
    """The cache in what a model or `generate` returned, or None.

    Raises:
        UnsupportedError: there is one under a name that is not known.
    """
    found = getattr(output, CACHE, None)
    return nothing_else(output) if found is None else found


def in_words_of(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A model's keyword arguments with the cache under the name that its class knows.

    Classes of other packages (the original LLaVA) may have kept the old one, and `generate` does not ask.
    """
    if CACHE == _OLD or CACHE not in kwargs:
        return kwargs
    known = inspect.signature(type(model).forward).parameters
    if CACHE in known or _OLD not in known:
        return kwargs
    return {_OLD if name == CACHE else name: value for name, value in kwargs.items()}


def is_cache(value: Any) -> bool:
    """Whether something is a cache of keys and values, whatever it is called."""
    return hasattr(type(value), "get_seq_length")


def nothing_else(named: Mapping[str, Any]) -> None:
    """Make sure that there is no cache under another name: who overlooked one would decode at wrong positions."""
    if strange := [name for name, value in named.items() if is_cache(value)]:
        raise UnsupportedError(
            f"a cache of keys and values comes under the name {strange[0]!r}, and vlmprune knows {CACHE!r}: decoding "
            "on it would be wrong. Use the model classes of a supported release of transformers."
        )
