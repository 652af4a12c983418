"""What a method asks for: where it cuts, what it wants to see, and what it decides there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from vlmprune.layout import Layout
    from vlmprune.taps import Tap

__all__ = ["Cut", "Decoder", "Merge", "Positions", "Reduction"]

Positions = Literal["original", "contiguous"]


@dataclass(frozen=True, order=True)
class Decoder:
    """A cut at the input of decoder layer `layer` (0-based); `Decoder(0)` is "before the LLM"."""

    layer: int


@dataclass(frozen=True)
class Merge:
    """The matrix M of X' = M X by its entries: `weight[e]` times token `source[e]` is added to token `into[e]`.

    Attributes:
        into: `(images, entries)` long, a kept token (an anchor).
        weight: `(images, entries)` float; the weights going into one anchor sum to 1 for a mean, 0 pads.
        source: `(images, entries)` long; None means that entry t is about token t.
    """

    into: torch.Tensor
    weight: torch.Tensor
    source: torch.Tensor | None = None


@dataclass(frozen=True)
class Reduction:
    """What a cut decides.

    Attributes:
        keep: `(images, tokens)` bool, True for the tokens (anchors) that stay; newlines included.
        counts: kept tokens of every image (newlines included) where the method knows them beforehand; None means
            that they are emergent and the engine reads them once from the device.
        patches: the same without newlines, where it is known beforehand.
        merge: how dropped tokens flow into kept ones; None drops them.
        scores: `(images, tokens)` float, for the trace only.
    """

    keep: torch.Tensor
    counts: list[int] | None = None
    patches: list[int] | None = None
    merge: Merge | None = None
    scores: torch.Tensor | None = None


@dataclass(frozen=True)
class Cut:
    """One place where tokens go.

    Attributes:
        at: the decoder layer at whose input the sequence gets shorter.
        see: taps handed to `reduce`, keyed by themselves.
        reduce: pure function `(seen, layout) -> Reduction`; picklable (a bound method of the method object).
        positions: "original" leaves the position ids of what is kept, "contiguous" closes the gaps.
    """

    at: Decoder
    see: tuple[Tap, ...]
    reduce: Callable[[dict[Tap, Any], Layout], Reduction]
    positions: Positions = "contiguous"
