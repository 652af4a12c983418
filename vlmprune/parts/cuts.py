"""What a method asks for: where it cuts, what it wants to see, and what it decides there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from vlmprune.parts.taps import Tap

__all__ = [
    "Clusters",
    "Cut",
    "Decoder",
    "Merge",
    "Pick",
    "Pixels",
    "Positions",
    "Projector",
    "Reduction",
    "Vision",
    "schedule_layers",
]

Positions = Literal["original", "contiguous"]


@dataclass(frozen=True, order=True)
class Decoder:
    """A cut at the input of decoder layer `layer` (0-based); `Decoder(0)` is "before the LLM"."""

    layer: int


@dataclass(frozen=True, order=True)
class Pixels:
    """In front of the tower: no token goes, the picture loses detail."""

    layer: int = 0


@dataclass(frozen=True, order=True)
class Vision:
    """A cut inside the vision tower, where tokens are merged.

    At the input of tower layer `layer` (0-based, from 1; the number of layers means behind the last one), or `inside`
    that layer (from 0), between its attention and its feed-forward block.
    """

    layer: int
    inside: bool = False


@dataclass(frozen=True, order=True)
class Projector:
    """Between tower and projector: what a patch stands for changes. A cut before the LLM, which sees `Kept`, drops."""

    layer: int = 0


@dataclass(frozen=True)
class Clusters:
    """What a cut in the tower decides.

    Attributes:
        into: `(views, tokens)` long, the new token that each token is merged into (size-weighted mean).
        count: number of new tokens, the same for every view.
    """

    into: torch.Tensor
    count: int


@dataclass(frozen=True)
class Merge:
    """The matrix M of X' = M X by its entries: `weight[e]` times token `source[e]` is added to token `into[e]`.

    Attributes:
        into: `(images, entries)` long, a kept token (an anchor).
        weight: `(images, entries)` float; the weights going into one anchor sum to 1 for a mean, 0 pads.
        source: `(images, entries)` long; None means that entry t is about token t. Where it is given, the tokens with
            a weight are fed in the order of their entries.
    """

    into: torch.Tensor
    weight: torch.Tensor
    source: torch.Tensor | None = None


@dataclass(frozen=True)
class Pick:
    """What a cut between tower and projector decides.

    Attributes:
        keep: `(views, patches)` bool, the patches (anchors) that stay.
        merge: what becomes of features, or None. Its numbers count the tower's tokens, [CLS] first where there is one,
            and its first axis is views; anchors that it names become the weighted sum of their sources.
    """

    keep: torch.Tensor
    merge: Merge | None = None


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
        soft: `(images, tokens)` float in [0, 1], for training: nothing is removed (`keep` says what would stay), and
            every later layer adds log(soft) to its attention scores on these tokens; the weights of several cuts
            multiply.
    """

    keep: torch.Tensor
    counts: list[int] | None = None
    patches: list[int] | None = None
    merge: Merge | None = None
    scores: torch.Tensor | None = None
    soft: torch.Tensor | None = None


@dataclass(frozen=True)
class Cut:
    """One place where tokens go.

    Attributes:
        at: the layer at whose input the sequence gets shorter.
        see: taps handed to `reduce`, keyed by themselves.
        reduce: pure function `(seen, layout) -> Reduction`, at `Vision(l)` `(seen, sizes) -> Clusters`, where sizes
            `(views, tokens)` says how many patches a token stands for, at `Projector()` `(seen, views) -> Pick` with
            the `Views` of the batch, at `Pixels()` `pixel_values -> pixel_values`;
            picklable (a bound method of the method object).
        positions: "original" leaves the position ids of what is kept, "contiguous" closes the gaps that this cut makes
            (decoder only).
        weigh: at `Vision(l)`: whether attention from there on counts a token as often as its size (adds log size to
            the scores).
        reorders: whether the reduction writes tokens in an order of its own (`Merge.source`). The layout does not
            follow that, so no other method may cut the sequence.
    """

    at: Pixels | Vision | Projector | Decoder
    see: tuple[Tap, ...]
    reduce: Callable[[dict[Tap, Any], Any], Reduction | Clusters | Pick]
    positions: Positions = "contiguous"
    weigh: bool = False
    reorders: bool = False


def schedule_layers(layers: tuple[int, ...], depth: int) -> list[int]:
    """Scale 1-based layers of a 32-layer decoder: max(previous + 1, round(p * depth / 32))."""
    scaled: list[int] = []
    for p in layers:
        scaled.append(max(scaled[-1] + 1 if scaled else 1, round(p * depth / 32)))
    return scaled
