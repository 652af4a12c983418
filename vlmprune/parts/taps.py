"""Taps: what a method asks to see, measured from one layer's input and what that layer's own modules make of it.

No tap knows a host: `TowerLayer` and `DecoderLayer` are what `vlmprune.patches` says of a layer. No layer needs eager
attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch

from vlmprune.errors import UnsupportedError
from vlmprune.parts.attention import (
    Visible,
    attention_mass,
    cls_logits,
    distinctness,
    last_rows,
    mean_logits,
    mean_weight,
    take_rows,
    upcast,
)
from vlmprune.parts.cuts import Decoder, Place, Projector, Vision
from vlmprune.parts.layers import DecoderLayer, Projections, Scene, TowerLayer
from vlmprune.parts.layout import upload
from vlmprune.parts.options import is_whole

if TYPE_CHECKING:
    from vlmprune.parts.facts import ModelFacts

__all__ = [
    "BlockFlow",
    "BlockKeys",
    "BlockTap",
    "Carried",
    "ClsLogits",
    "ClusterOf",
    "CrossShare",
    "DecoderTap",
    "Distinctness",
    "Hidden",
    "Inputs",
    "Kept",
    "Pixels",
    "ReceivedAttention",
    "Seen",
    "Tap",
    "TextAttention",
    "TextFlow",
    "TowerTap",
    "VisionAttention",
    "decoder_mass",
    "visual_entries",
]


VisionRows = Literal["cls", "patches", "all"]
NO_CLS = "this tower has no [CLS] token"


@dataclass(frozen=True)
class Tap:
    """Base of all taps; a tap is its own key in what `reduce` sees."""

    def misfit(self, at: Place, facts: ModelFacts) -> str | None:
        """Why a cut at `at` cannot see this tap in a model, or None: asked before anything runs."""
        return "nothing would measure it: derive it from TowerTap, DecoderTap or BlockTap"


#: What `reduce` sees: the values of the taps that its cut asked for, by tap.
Seen = dict[Tap, torch.Tensor]


def misplaced(at: Place) -> str | None:
    """Why a cut cannot see what is known when the tower is done, or None."""
    inside = "a cut in the tower sees Hidden(), BlockKeys(layer), BlockFlow(layer) and Carried() alone"
    return inside if isinstance(at, Vision) else None


def outside(layer: object, most: int, what: str) -> str | None:
    """Why `layer` is no layer from 0 to `most`, or None."""
    return None if is_whole(layer, most=most) else f"{what} 0..{most}"


def unknown(name: str, value: object, choices: object) -> str | None:
    """Why `value` is none of a Literal's, or None."""
    allowed = get_args(choices)
    return None if value in allowed else f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}"


def windowed(layer: int, facts: ModelFacts) -> str | None:
    """Why attention received in a tower layer does not compare the patches of a picture, or None."""
    if layer not in facts.windowed:
        return None
    whole = ", ".join(str(n) for n in range(facts.tower_layers) if n not in facts.windowed)
    return f"in this layer a patch sees its window alone, whose scores do not compare with others'; take one of {whole}"


def recurrent(layer: int, facts: ModelFacts) -> str | None:
    """Why nothing attends in a decoder layer, or None."""
    if layer not in facts.recurrent:
        return None
    return f"that layer is recurrent, and has no attention; take one of {', '.join(map(str, facts.attending))}"


def elsewhere(tap: TowerTap, at: Vision, what: str) -> str | None:
    """Why a cut in the tower cannot see what a layer projects, which is seen as it runs, or None."""
    made, which = (at.layer, "its own layer") if at.inside else (at.layer - 1, "the layer before it")
    return None if tap.layer == made else f"this cut sees {what} of {which}, {made}"


def of_no_layer(tap: TowerTap) -> str | None:
    """Why a tap that is known when the tower is done cannot be of a layer, or None."""
    return None if tap.layer == -1 else f"it is of no layer: write {type(tap).__name__}()"


@dataclass(frozen=True)
class TowerTap(Tap):
    """A tap measured at the input of tower layer `layer` (0-based)."""

    layer: int

    behind_last: ClassVar[bool] = False  # whether it can be measured of the last layer's output, `measure(None, ...)`
    vectors: ClassVar[bool] = False  # whether it says more of a patch than one number
    attends: ClassVar[bool] = False  # whether it compares patches by attention, which ends at a window

    def misfit(self, at: Place, facts: ModelFacts) -> str | None:
        # hosts hand out the output of the last layer only where it becomes the features
        most = facts.tower_layers - 1 + (self.behind_last and facts.feature_layer == facts.tower_layers - 1)
        wrong = misplaced(at) or outside(self.layer, most, "this tower has layers")
        return wrong or (windowed(self.layer, facts) if self.attends else None)

    def measure(self, layer: TowerLayer, hidden: torch.Tensor, has_cls: bool) -> torch.Tensor:
        """From the layer's input `(views, tokens, dim)`; returns `(views, patches, ...)`."""
        raise NotImplementedError


@dataclass(frozen=True)
class DecoderTap(Tap):
    """A tap measured at the input of decoder layer `layer` (0-based): before a cut there, after it for later cuts."""

    attends: ClassVar[bool] = False  # whether it asks its layer for queries or keys

    layer: int

    def misfit(self, at: Place, facts: ModelFacts) -> str | None:
        if isinstance(at, Projector):
            return "no decoder layer has run before this cut"
        wrong = misplaced(at) or outside(self.layer, at.layer, "its layer must not lie behind the cut, so be one of")
        return wrong or (recurrent(self.layer, facts) if self.attends else None)

    def measure(self, layer: DecoderLayer, hidden: torch.Tensor, scene: Scene) -> torch.Tensor:
        """From the layer's input `(batch, length, dim)`; returns `(images, tokens, ...)`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Hidden(Tap):
    """The visual tokens' own vectors at the cut, `(images, tokens, dim)`: the projected features at `Decoder(0)`.

    At `Vision(l)` and `Projector()` the tower's, `(views, tokens, dim)`, the [CLS] token's included.
    """

    def misfit(self, at: Place, facts: ModelFacts) -> str | None:
        return None


@dataclass(frozen=True)
class VisionAttention(TowerTap):
    """Attention of a tower layer: post-softmax, head mean.

    `rows="cls"` is the [CLS] query's row over patch keys; `rows="patches"` the mean over patch queries, so the
    attention each patch receives, and `rows="all"` that over all queries, the [CLS] token's included. Arrives as
    `(images, tokens)` float32 (newlines and padding are arbitrary).
    """

    attends: ClassVar[bool] = True

    rows: VisionRows = "cls"

    def misfit(self, at: Place, facts: ModelFacts) -> str | None:
        no_cls = NO_CLS if self.rows == "cls" and not facts.has_cls else None
        return super().misfit(at, facts) or unknown("rows", self.rows, VisionRows) or no_cls

    def measure(self, layer: TowerLayer, hidden: torch.Tensor, has_cls: bool) -> torch.Tensor:
        first, normed = int(has_cls), layer.normed(hidden)
        rows = {"cls": normed[:, :1], "patches": normed[:, first:], "all": normed}[self.rows]
        return attention_mass(layer.queries(rows), layer.keys(normed), layer.scale)[:, first:]


@dataclass(frozen=True)
class ClsLogits(TowerTap):
    """The [CLS] query's scaled scores over patch keys in a tower layer before the softmax: signed, head mean."""

    def misfit(self, at: Place, facts: ModelFacts) -> str | None:
        return super().misfit(at, facts) or (None if facts.has_cls else NO_CLS)

    def measure(self, layer: TowerLayer, hidden: torch.Tensor, has_cls: bool) -> torch.Tensor:
        normed = layer.normed(hidden)
        return cls_logits(layer.queries(normed[:, :1])[..., 0, :], layer.keys(normed[:, 1:]), layer.scale)


@dataclass(frozen=True)
class Distinctness(TowerTap):
    """Negated cosine of every patch to the mean patch of its view, at the input of a tower layer or behind the last."""

    behind_last: ClassVar[bool] = True

    def misfit(self, at: Place, facts: ModelFacts) -> str | None:
        packed = "this tower packs pictures of any size into one sequence, without views" if facts.packed else None
        return super().misfit(at, facts) or packed

    def measure(self, layer: TowerLayer | None, hidden: torch.Tensor, has_cls: bool) -> torch.Tensor:
        return distinctness(hidden[:, int(has_cls) :])


@dataclass(frozen=True)
class BlockKeys(TowerTap):
    """Head-mean keys of a tower layer's attention, `(views, tokens, dim)`, for cuts in and behind the tower.

    Taken from the layer's own key projection as it runs.
    """

    def misfit(self, at: Place, facts: ModelFacts) -> str | None:
        if isinstance(at, Projector):
            return outside(self.layer, facts.tower_layers - 1, "this tower has layers")
        if not isinstance(at, Vision):
            return "only cuts in the tower, Vision(layer), and behind it, Projector(), see keys"
        return elsewhere(self, at, "the keys")


@dataclass(frozen=True)
class BlockFlow(TowerTap):
    """What flows between the [CLS] token and the others in a tower layer, `(views, tokens, 3)`, for cuts in the tower.

    The attention that it pays a token, how much that token's values are like its own (softmax of their products), both
    head means, and the length (L1) of the token's head-mean values. Without a [CLS] token the mean over all tokens
    stands for it. Taken from the layer's own projections as they run.
    """

    def misfit(self, at: Place, facts: ModelFacts) -> str | None:
        return (
            elsewhere(self, at, "the flow") if isinstance(at, Vision) else "only cuts in the tower, Vision(layer), do"
        )

    @staticmethod
    def of(projected: Projections, there: torch.Tensor, has_cls: bool) -> torch.Tensor:
        """From what a layer's projections made, of the tokens that are `there`, `(views, tokens)` bool."""
        rows = slice(1) if has_cls else slice(None)
        weight, seen = mean_weight(there[:, rows]), Visible(real=there)
        paid, alike = (
            attention_mass(own[:, :, rows], others, scale, seen, weight)
            for own, others, scale in (
                (projected.query, projected.key, projected.scale),
                (projected.value, projected.value, 1.0),
            )
        )
        return torch.stack((paid, alike, upcast(projected.value).mean(1).abs().sum(-1)), -1)


@dataclass(frozen=True)
class Carried(TowerTap):
    """The scores that the cut in the tower before this one left, of the tokens that stayed, `(views, tokens)`."""

    layer: int = -1  # of the cut before

    def misfit(self, at: Place, facts: ModelFacts) -> str | None:
        return of_no_layer(self) if isinstance(at, Vision) else "only cuts in the tower, Vision(layer), do"


@dataclass(frozen=True)
class ClusterOf(TowerTap):
    """After cuts in the tower: the number of the cluster that every patch belongs to at the feature layer.

    -1 is that of patches which were dropped.
    """

    layer: int = -1  # known when the tower is done

    def misfit(self, at: Place, facts: ModelFacts) -> str | None:
        return misplaced(at) or of_no_layer(self)


@dataclass(frozen=True)
class Kept(TowerTap):
    """What cuts in the tower, or between it and the projector, have kept, `(images, tokens)` bool.

    Nothing is said of newlines.
    """

    layer: int = -1  # known when the tower is done

    def misfit(self, at: Place, facts: ModelFacts) -> str | None:
        wrong = None if isinstance(at, Decoder) else "only cuts in the language model come behind the one that keeps"
        return wrong or of_no_layer(self)


@dataclass(frozen=True)
class Inputs(DecoderTap):
    """The visual tokens' own vectors at the input of a decoder layer, `(images, tokens, dim)`."""

    def measure(self, layer: DecoderLayer, hidden: torch.Tensor, scene: Scene) -> torch.Tensor:
        return hidden.flatten(0, 1)[scene.flat_index()]


@dataclass(frozen=True)
class Pixels(TowerTap):
    """The pixels that every patch is made of, as the tower gets them, `(images, tokens, channels * height * width)`."""

    layer: int = -1  # known before the tower runs

    def misfit(self, at: Place, facts: ModelFacts) -> str | None:
        return misplaced(at) or of_no_layer(self)

    @staticmethod
    def of(pixels: torch.Tensor, patches: int) -> torch.Tensor:
        """`(views, channels, height, width)` in square views of so many patches: `(views, patches, pixels)`."""
        side = math.isqrt(patches)
        high, wide = (n // side for n in pixels.shape[-2:])
        blocks = pixels[..., : side * high, : side * wide].unfold(2, high, high).unfold(3, wide, wide)
        return blocks.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


@dataclass(frozen=True)
class TextAttention(DecoderTap):
    """Attention that visual tokens receive in a decoder layer: post-softmax, mean over heads and query rows.

    `rows="last"` is the last prompt token's row, `rows="instruction"` the mean over the rows of all text after the
    last image (the last token's where there is none), `rows="all"` the mean over every real token's row. Arrives as
    `(images, tokens)` float32.
    """

    attends = True

    rows: Literal["last", "instruction", "all"] = "last"

    def misfit(self, at: Place, facts: ModelFacts) -> str | None:
        return super().misfit(at, facts) or unknown("rows", self.rows, Literal["last", "instruction", "all"])

    def measure(self, layer: DecoderLayer, hidden: torch.Tensor, scene: Scene) -> torch.Tensor:
        real = scene.sequence.asked()
        if self.rows == "all":
            at = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)
            weight = mean_weight(real)
        else:
            at, weight = last_rows(
                real, *((real.new_ones(len(real), dtype=torch.long), 1) if self.rows == "last" else scene.text_after)
            )
        mass = decoder_mass(layer, hidden, scene, [(at, weight)], pictures=self.rows == "all")
        return mass[0].flatten()[scene.flat_index()]


@dataclass(frozen=True)
class TextFlow(DecoderTap):
    """What flows between a prompt's last token and the patches of an image in a decoder layer, `(images, tokens, 3)`.

    As `BlockFlow`, with softmaxes over the image's patches alone, and products of values over the root of their width.
    """

    attends = True

    def measure(self, layer: DecoderLayer, hidden: torch.Tensor, scene: Scene) -> torch.Tensor:
        check_sight(layer, scene, pictures=False)
        normed, (cos, sin) = layer.normed(hidden), scene.sequence.rotary
        layout, at, real = scene.layout, scene.flat_index(), scene.sequence.asked()
        sample = upload(layout.sample, hidden.device)
        last, weight = last_rows(real, real.new_ones(len(real), dtype=torch.long), 1)
        row, there = take_rows(normed, last), Visible(real=layout.patches)
        bias = None if scene.sequence.bias is None else scene.sequence.bias.flatten()[at]
        keys, values = (
            x.transpose(1, 2).flatten(0, 1)[at].transpose(1, 2)
            for x in (layer.keys(normed, cos, sin), layer.values(normed))
        )
        paid, alike = (
            attention_mass(own[sample], others, layer.scale, there, weight[sample], bias)
            for own, others in (
                (layer.queries(row, take_rows(cos, last), take_rows(sin, last)), keys),
                (layer.values(row), values),
            )
        )
        return torch.stack((paid, alike, upcast(values).mean(1).abs().sum(-1)), -1)


@dataclass(frozen=True)
class ReceivedAttention(DecoderTap):
    """Attention that visual tokens receive in a decoder layer from their own image and from the text.

    Arrives as `(images, tokens, 2)` float32, head mean: the mean over the rows of the image's patches ("self"), and the
    mean over the rows of all text after the last image ("cross", the last token's where there is none). Under soft
    masks the rows of patches count by their weight. `logits=True` takes "self" before the softmax, as a mean over the
    rows that see the token (causal).
    """

    attends = True

    logits: bool = False

    def misfit(self, at: Place, facts: ModelFacts) -> str | None:
        wrong = None if isinstance(self.logits, bool) else f"logits={self.logits!r} must be True or False"
        return super().misfit(at, facts) or wrong

    def measure(self, layer: DecoderLayer, hidden: torch.Tensor, scene: Scene) -> torch.Tensor:
        layout, at = scene.layout, scene.flat_index()
        entries = scene.sequence.index_of(layout)
        part = layout.patches.to(torch.float32) if layout.soft is None else layout.patches * layout.soft
        part = part / part.sum(1, keepdim=True).clamp(min=torch.finfo(part.dtype).tiny)
        own = []
        for ordinal in range(max(layout.ordinal) + 1):
            images = [-1] * len(hidden)
            for image, (sample, number) in enumerate(zip(layout.sample, layout.ordinal, strict=True)):
                images[sample] = image if number == ordinal else images[sample]
            index = upload(images, hidden.device)  # samples with fewer images take any and weigh it 0
            own.append((entries[index], part[index] * (index >= 0)[:, None]))
        text = last_rows(scene.sequence.asked(), *scene.text_after)
        if self.logits:
            masses = decoder_mass(layer, hidden, scene, own, mean_logits)
            masses += decoder_mass(layer, hidden, scene, [text])
        else:
            masses = decoder_mass(layer, hidden, scene, [*own, text])
        mine = at + upload(layout.ordinal, hidden.device)[:, None] * hidden.shape[0] * hidden.shape[1]
        return torch.stack((torch.stack(masses[:-1]).flatten()[mine], masses[-1].flatten()[at]), -1)


@dataclass(frozen=True)
class CrossShare(DecoderTap):
    """How much text and image of a sample look at each other in a decoder layer, `(images, 2)` float32.

    Share of the attention of text rows that goes to visual tokens, and share of the attention of visual rows that goes
    to that text (ToDRE, stage 2). Equal for all images of a sample.

    Text is what is not visual, but for the first `system` tokens of the conversation (where they stand in front of the
    first image); None takes all that stands in front of it for system text. What a cache holds is no part of it.
    """

    attends = True

    system: int | None = None

    def misfit(self, at: Place, facts: ModelFacts) -> str | None:
        told = self.system is None or is_whole(self.system)
        wrong = None if told else f"system={self.system!r} must be a number of tokens of at least 0, or None"
        return super().misfit(at, facts) or wrong

    def measure(self, layer: DecoderLayer, hidden: torch.Tensor, scene: Scene) -> torch.Tensor:
        layout, real = scene.layout, scene.sequence.asked()
        sample, visual = upload(layout.sample, hidden.device), visual_entries(scene)
        text = real & ~visual & ((visual.cumsum(1) > 0) | self.beyond_system(scene, real))
        alone = self.system is None or (scene.sequence.past is None and scene.text_before <= self.system)
        alone = alone and max(layout.ordinal) == 0 and not scene.text_between
        if alone and scene.sequence.blocks is None:
            # one image a sample and no text before or in it: what comes after cannot be seen from it, and the rows of
            # that alone need to be computed
            rows = [last_rows(real, *scene.text_after)]
        else:
            all_rows = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)
            rows = [(all_rows, mean_weight(text)), (all_rows, mean_weight(visual))]
        mass = decoder_mass(layer, hidden, scene, rows)
        shares = [
            (mass[0] * visual).sum(1),
            (mass[1] * text).sum(1) if len(mass) > 1 else mass[0].new_zeros(len(hidden)),
        ]
        return torch.stack(shares, 1)[sample]

    def beyond_system(self, scene: Scene, real: torch.Tensor) -> torch.Tensor:
        """`(batch, length)` bool of the tokens behind the system prefix, which a cache may hold in part or whole."""
        if self.system is None:
            return torch.zeros_like(real)
        past, number = scene.sequence.past, real.cumsum(1)
        if past is not None:
            number = number + (past.length if past.mask is None else past.mask.sum(1, keepdim=True))
        return number > self.system


@dataclass(frozen=True)
class BlockTap(Tap):
    """A tap on the two blocks (attention, feed-forward) of decoder layer `layer`: what each did to every token."""

    layer: int

    def misfit(self, at: Place, facts: ModelFacts) -> str | None:
        if isinstance(at, Projector) or (isinstance(at, Decoder) and at.layer == 0):
            return "no decoder layer has run before this cut"
        return misplaced(at) or outside(self.layer, at.layer - 1, "its layer must have run before the cut, one of")

    def measure(self, before: torch.Tensor, after: torch.Tensor, scene: Scene) -> torch.Tensor:
        """From a block's input and output, both `(batch, length, dim)`; the engine adds up a layer's two blocks.

        Args:
            before: what the block read (normalised hidden states).
            after: what it wrote, before the residual is added.
        """
        raise NotImplementedError


def visual_entries(scene: Scene) -> torch.Tensor:
    """`(batch, length)` bool, the visual tokens."""
    real = scene.sequence.asked()
    visual = torch.zeros(real.numel(), dtype=torch.long, device=real.device)
    visual = visual.scatter_add(0, scene.flat_index().flatten(), scene.layout.alive.long().flatten())
    return visual.view_as(real) > 0


def decoder_mass(
    layer: DecoderLayer,
    hidden: torch.Tensor,
    scene: Scene,
    rows: list[tuple[torch.Tensor, torch.Tensor]],
    measure: Callable[..., torch.Tensor] = attention_mass,
    pictures: bool = True,
) -> list[torch.Tensor]:
    """Attention mass `(batch, length)` on every key of a decoder layer, for each set of query rows with weights.

    What the layer's cache holds in front of the sequence takes its share.

    Args:
        pictures: whether rows of visual tokens are among them.
    """
    check_sight(layer, scene, pictures)
    normed, (cos, sin) = layer.normed(hidden), scene.sequence.rotary
    key = layer.keys(normed, cos, sin)
    past, real = scene.past_keys(layer)
    columns = 0 if past is None else past.shape[2]
    key = key if past is None else torch.cat((past.to(key), key), 2)
    masses = []
    for at, weight in rows:
        query = layer.queries(take_rows(normed, at), take_rows(cos, at), take_rows(sin, at))
        seen = Visible(scene.sequence.reach(at) + columns, real, layer.window or 0)
        masses.append(measure(query, key, layer.scale, seen, weight, scene.sequence.bias)[:, columns:])
    return masses


def check_sight(layer: DecoderLayer, scene: Scene, pictures: bool) -> None:
    """Refuse a layer whose window hides what attention is to be read of."""
    if not layer.window:
        return
    past, longest = scene.sequence.past, max(scene.sequence.lengths)
    longest += 0 if past is None else past.length
    if layer.far_sighted and longest > layer.window:
        raise UnsupportedError(
            f"a method of this patch looks at attention in decoder layer {layer.index}, which sees the last "
            f"{layer.window} tokens alone, and this prompt has {longest}: what it says of the others means nothing. "
            f"Have it look at one of the layers that see all: {', '.join(map(str, layer.far_sighted))}."
        )
    if pictures and scene.sequence.blocks is not None:
        raise UnsupportedError(
            f"a method of this patch looks at what pictures attend to in decoder layer {layer.index}, where they see "
            "all of themselves within a window; that is not supported. Have it look at a layer without a window."
        )
