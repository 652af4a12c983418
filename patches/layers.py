"""What adapters of all kinds of layers share: where the parts of a layer are, and which adapter is a layer's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import nn

from vlmprune.errors import UnsupportedError
from vlmprune.parts.attention import split_heads

__all__ = ["HostLayer", "kind_of"]

T = TypeVar("T")


@dataclass(frozen=True)
class HostLayer:
    """A layer of an attention and a feed-forward block, with a norm in front of the attention.

    Attributes:
        names: what the host calls these three.
    """

    module: nn.Module
    names: ClassVar[tuple[str, str, str]]

    @property
    def attention(self) -> nn.Module:
        """The attention block."""
        return getattr(self.module, self.names[0])

    @property
    def feed_forward(self) -> nn.Module:
        """The block behind it."""
        return getattr(self.module, self.names[1])

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        return getattr(self.module, self.names[2])(hidden)

    def heads(self, projected: torch.Tensor) -> torch.Tensor:
        """`(..., rows, heads x head dim)` as `(..., heads, rows, head dim)`."""
        return split_heads(projected, self.attention.head_dim)


def kind_of(known: Mapping[str, T], module: nn.Module, looks: str, way: str) -> T:
    """The adapter of a layer, by the name of its class or of one that it derives from.

    Args:
        looks: what a patch looks into, and `way` a way out, where it cannot.

    Raises:
        UnsupportedError: a layer of another class.
    """
    for cls in type(module).__mro__:
        if cls.__name__ in known:
            return known[cls.__name__]
    raise UnsupportedError(
        f"this patch looks into {looks}, and {type(module).__name__} is not one that is known ({', '.join(known)}): "
        f"take a method that {way}."
    )
