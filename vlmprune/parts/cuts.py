"""What a method asks for: where it cuts, what it wants to see, and what it decides there.

There are five kinds with a contract of their own each: `PixelCut`, `PatchCut`, `TowerCut`, `ProjectorCut`, and `Cut` in
the language model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    import torch

    from vlmprune.parts.layout import Layout, Views
    from vlmprune.parts.taps import Tap

__all__ = [
    "AnyCut",
    "Clusters",
    "Cut",
    "Decoder",
    "Merge",
    "PatchCut",
    "Pick",
    "PixelCut",
    "Place",
    "Positions",
    "Projector",
    "ProjectorCut",
    "Reduction",
    "Stay",
    "TowerCut",
    "Vision",
    "schedule_layers",
]

Positions = Literal["original", "contiguous"]


@dataclass(frozen=True, order=True)
class Decoder:
    """A cut at the input of decoder layer `layer` (0-based); `Decoder(0)` is "before the LLM"."""

    layer: int


@dataclass(frozen=True, order=True)
class Vision:
    """A cut inside the vision tower, where tokens are merged or dropped.

    At the input of tower layer `layer` (0-based, from 1 to the one behind the feature layer), or `inside` that layer
    (from 0 to the feature layer), between its attention and its feed-forward block.
    """

    layer: int
    inside: bool = False


@dataclass(frozen=True, order=True)
class Projector:
    """Between tower and projector, the place of every `ProjectorCut`."""


Place = Vision | Projector | Decoder


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
class Stay:
    """What a cut in the tower decides that drops tokens instead of merging them.

    Attributes:
        keep: `(views, tokens)` bool, the tokens that stay, of every view as many as it likes; None for all.
        count: how many that is, where it is the same for every view and known beforehand; None means that the engine
            reads it once from the device.
        scores: `(views, tokens)` float for the next cut in the tower, which sees those of what stayed (`Carried`).
    """

    keep: torch.Tensor | None
    count: int | None = None
    scores: torch.Tensor | None = None


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
        mix: the same as a matrix, or None: `(views, patches, patches)`, by which every patch becomes a mixture of all;
            the [CLS] token stays what it is. One of the two.
    """

    keep: torch.Tensor
    merge: Merge | None = None
    mix: torch.Tensor | None = None


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
    """Where tokens leave the language model's sequence.

    Attributes:
        at: the layer at whose input the sequence gets shorter.
        see: taps handed to `reduce`, keyed by themselves.
        reduce: pure function `(seen, layout) -> Reduction`; picklable (a bound method of the method object).
        positions: "original" leaves the position ids of what is kept, "contiguous" closes the gaps that this cut makes;
            None is contiguous where positions count, and original where they lie on several axes (M-RoPE).
        reorders: whether the reduction writes tokens in an order of its own (`Merge.source`). The layout does not
            follow that, so no other method may cut the sequence.
    """

    at: Decoder
    see: tuple[Tap, ...]
    reduce: Callable[[dict[Tap, Any], Layout], Reduction]
    positions: Positions | None = None
    reorders: bool = False


@dataclass(frozen=True)
class TowerCut:
    """Where tokens are merged or dropped inside the vision tower.

    Attributes:
        at: the place.
        see: taps handed to `reduce`: `Hidden()`, `BlockKeys(layer)`, `BlockFlow(layer)` and `Carried()` alone.
        reduce: pure function `(seen, sizes) -> Clusters`, or `Stay`, where sizes `(views, tokens)` float says how many
            patches a token stands for: 0 behind the last token of a view of which fewer are left; picklable.
        weigh: whether attention from there on counts a token as often as its size (adds log size to the scores).
    """

    at: Vision
    see: tuple[Tap, ...]
    reduce: Callable[[dict[Tap, Any], torch.Tensor], Clusters | Stay]
    weigh: bool = False


@dataclass(frozen=True)
class ProjectorCut:
    """Between tower and projector, where what a patch stands for changes; a `Cut` that sees `Kept` drops the others.

    Attributes:
        see: taps handed to `reduce`: of the tower, and `Hidden()`.
        reduce: pure function `(seen, views) -> Pick` with the `Views` of the batch; picklable.
    """

    at: ClassVar[Projector] = Projector()
    see: tuple[Tap, ...]
    reduce: Callable[[dict[Tap, Any], Views], Pick]


@dataclass(frozen=True)
class PixelCut:
    """In front of the tower, where there is nothing to see: no token goes, the picture loses detail.

    Attributes:
        reduce: pure function `pixel_values -> pixel_values`; picklable.
    """

    at: ClassVar[None] = None
    see: ClassVar[tuple[Tap, ...]] = ()
    reduce: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class PatchCut:
    """In front of a tower that packs pictures of any size: tokens go before its layers read their patches.

    What is left keeps its places. A `Cut` that sees `Kept` drops the others.

    Attributes:
        reduce: pure function `(pixels, sizes) -> keep` of the `(tokens, numbers)` that every token is made of, in
            raster order frame by frame, and of the (frames, rows, columns) of tokens of every image or video in them;
            keep is `(tokens,)` bool. Picklable.
    """

    at: ClassVar[None] = None
    see: ClassVar[tuple[Tap, ...]] = ()
    reduce: Callable[[torch.Tensor, list[tuple[int, int, int]]], torch.Tensor]


AnyCut = PixelCut | PatchCut | TowerCut | ProjectorCut | Cut


def schedule_layers(layers: tuple[int, ...], depth: int) -> list[int]:
    """Scale 1-based layers of a 32-layer decoder: max(previous + 1, round(p * depth / 32))."""
    scaled: list[int] = []
    for p in layers:
        scaled.append(max(scaled[-1] + 1 if scaled else 1, round(p * depth / 32)))
    return scaled
