"""Taps: what a method asks to see, measured from one layer's input and that layer's own projections.

Attention is recomputed for the rows asked for, in float32, so no layer needs eager attention; what needs all rows is
chunked and never stored as N x N.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Protocol, get_args

import torch
from torch import nn

from vlmprune.kernels.reference import CHUNK, upcast, visible_keys
from vlmprune.parts.cuts import Decoder, Pixels, Vision
from vlmprune.parts.layout import upload

if TYPE_CHECKING:
    from vlmprune.engine.sequence import Sequence
    from vlmprune.parts.layout import Layout
    from vlmprune.patches import ModelFacts

__all__ = [
    "BlockKeys",
    "BlockTap",
    "ClsLogits",
    "ClusterOf",
    "CrossShare",
    "DecoderTap",
    "Distinctness",
    "Hidden",
    "ReceivedAttention",
    "Tap",
    "TextAttention",
    "TowerTap",
    "Visible",
    "VisionAttention",
    "attention_mass",
    "upcast",
]


NO_CLS = "this tower has no [CLS] token"


class Scene(Protocol):
    """What a decoder tap may look at while it measures: the current sequence and where its visual tokens are.

    `text_after` counts the tokens after the last visual token of every batch row, and says how many are the most;
    `text_before` is the most that any row has in front of its first one.
    """

    sequence: Sequence
    layout: Layout
    text_after: tuple[torch.Tensor, int]
    text_before: int

    def past_keys(self, layer: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The keys that a decoder layer holds in front of the sequence, or None, and which keys of both are real."""

    def flat_index(self) -> torch.Tensor:
        """`(images, tokens)` index of every visual token into the flattened `(batch * length)` sequence."""


@dataclass(frozen=True)
class Tap:
    """Base of all taps; a tap is its own key in what `reduce` sees."""

    def misfit(self, at: Pixels | Vision | Decoder, facts: ModelFacts) -> str | None:
        """Why a cut at `at` cannot see this tap in a model, or None: asked before anything runs."""
        return "nothing would measure it: derive it from TowerTap, DecoderTap or BlockTap"


def misplaced(at: Pixels | Vision | Decoder) -> str | None:
    """Why a cut cannot see what is known when the tower is done, or None."""
    if isinstance(at, Pixels):
        return "there is nothing to see before the tower has run"
    return "a cut in the tower sees Hidden() and BlockKeys(layer) alone" if isinstance(at, Vision) else None


def outside(layer: object, most: int, what: str) -> str | None:
    """Why `layer` is no layer from 0 to `most`, or None."""
    if isinstance(layer, int) and not isinstance(layer, bool) and 0 <= layer <= most:
        return None
    return f"{what} 0..{most}"


def unknown(name: str, value: object, choices: object) -> str | None:
    """Why `value` is none of a Literal's, or None."""
    allowed = get_args(choices)
    return None if value in allowed else f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}"


@dataclass(frozen=True)
class TowerTap(Tap):
    """A tap measured at the input of tower layer `layer` (0-based)."""

    layer: int

    behind_last: ClassVar[bool] = False  # whether it can be measured behind the last layer, `measure(None, ...)`

    def misfit(self, at: Pixels | Vision | Decoder, facts: ModelFacts) -> str | None:
        most = facts.tower_layers - (not self.behind_last)
        return misplaced(at) or outside(self.layer, most, "this tower has layers")

    def measure(self, layer: nn.Module, hidden: torch.Tensor, has_cls: bool) -> torch.Tensor:
        """From the layer's input `(views, tokens, dim)`; returns `(views, patches, ...)`."""
        raise NotImplementedError


@dataclass(frozen=True)
class DecoderTap(Tap):
    """A tap measured at the input of decoder layer `layer` (0-based): before a cut there, after it for later cuts."""

    layer: int

    def misfit(self, at: Pixels | Vision | Decoder, facts: ModelFacts) -> str | None:
        return misplaced(at) or outside(self.layer, at.layer, "its layer must not lie behind the cut, so be one of")

    def measure(self, layer: nn.Module, hidden: torch.Tensor, scene: Scene) -> torch.Tensor:
        """From the layer's input `(batch, length, dim)`; returns `(images, tokens, ...)`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Hidden(Tap):
    """The visual tokens' own vectors at the cut, `(images, tokens, dim)`: the projected features at `Decoder(0)`.

    At `Vision(l)` the tower's, `(views, tokens, dim)`, the [CLS] token's included.
    """

    def misfit(self, at: Pixels | Vision | Decoder, facts: ModelFacts) -> str | None:
        return misplaced(at) if isinstance(at, Pixels) else None


@dataclass(frozen=True)
class VisionAttention(TowerTap):
    """Attention of a tower layer: post-softmax, head mean.

    `rows="cls"` is the [CLS] query's row over patch keys; `rows="patches"` the mean over patch queries, so the
    attention each patch receives. Arrives as `(images, tokens)` float32 (newlines and padding are arbitrary).
    """

    rows: Literal["cls", "patches"] = "cls"

    def misfit(self, at: Pixels | Vision | Decoder, facts: ModelFacts) -> str | None:
        no_cls = NO_CLS if self.rows == "cls" and not facts.has_cls else None
        return super().misfit(at, facts) or unknown("rows", self.rows, Literal["cls", "patches"]) or no_cls

    def measure(self, layer: nn.Module, hidden: torch.Tensor, has_cls: bool) -> torch.Tensor:
        attention, first = layer.self_attn, int(has_cls)
        normed = layer.layer_norm1(hidden)
        rows = normed[:, :1] if self.rows == "cls" else normed[:, first:]
        query = split_heads(attention.q_proj(rows), attention.head_dim)
        key = split_heads(attention.k_proj(normed), attention.head_dim)
        return attention_mass(query, key, attention.scale)[:, first:]


@dataclass(frozen=True)
class ClsLogits(TowerTap):
    """The [CLS] query's scaled scores over patch keys in a tower layer before the softmax: signed, head mean."""

    def misfit(self, at: Pixels | Vision | Decoder, facts: ModelFacts) -> str | None:
        return super().misfit(at, facts) or (None if facts.has_cls else NO_CLS)

    def measure(self, layer: nn.Module, hidden: torch.Tensor, has_cls: bool) -> torch.Tensor:
        attention, normed = layer.self_attn, layer.layer_norm1(hidden)
        query = split_heads(attention.q_proj(normed[:, :1]), attention.head_dim)
        key = split_heads(attention.k_proj(normed[:, 1:]), attention.head_dim)
        return cls_logits(query[..., 0, :], key, attention.scale)


@dataclass(frozen=True)
class Distinctness(TowerTap):
    """Negated cosine of every patch to the mean patch of its view, at the input of a tower layer or behind the last."""

    behind_last: ClassVar[bool] = True

    def measure(self, layer: nn.Module | None, hidden: torch.Tensor, has_cls: bool) -> torch.Tensor:
        return distinctness(hidden[:, int(has_cls) :])


@dataclass(frozen=True)
class BlockKeys(TowerTap):
    """Head-mean keys of a tower layer's attention, `(views, tokens, dim)`, for cuts in the tower.

    Taken from the layer's own key projection as it runs.
    """

    def misfit(self, at: Pixels | Vision | Decoder, facts: ModelFacts) -> str | None:
        if not isinstance(at, Vision):
            return "only cuts in the tower, Vision(layer), see keys"
        made, which = (at.layer, "its own layer") if at.inside else (at.layer - 1, "the layer before it")
        return None if self.layer == made else f"this cut sees the keys of {which}, {made}"


@dataclass(frozen=True)
class ClusterOf(TowerTap):
    """After cuts in the tower: the number of the cluster that every patch belongs to at the feature layer."""

    layer: int = -1  # known when the tower is done

    def misfit(self, at: Pixels | Vision | Decoder, facts: ModelFacts) -> str | None:
        return misplaced(at)


@dataclass(frozen=True)
class TextAttention(DecoderTap):
    """Attention that visual tokens receive in a decoder layer: post-softmax, mean over heads and query rows.

    `rows="last"` is the last prompt token's row, `rows="instruction"` the mean over the rows of all text after the
    last image (the last token's where there is none), `rows="all"` the mean over every real token's row. Arrives as
    `(images, tokens)` float32.
    """

    rows: Literal["last", "instruction", "all"] = "last"

    def misfit(self, at: Pixels | Vision | Decoder, facts: ModelFacts) -> str | None:
        return super().misfit(at, facts) or unknown("rows", self.rows, Literal["last", "instruction", "all"])

    def measure(self, layer: nn.Module, hidden: torch.Tensor, scene: Scene) -> torch.Tensor:
        real = scene.sequence.asked()
        if self.rows == "all":
            at = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)
            weight = mean_weight(real)
        else:
            at, weight = last_rows(
                real, *((real.new_ones(len(real), dtype=torch.long), 1) if self.rows == "last" else scene.text_after)
            )
        return decoder_mass(layer, hidden, scene, [(at, weight)])[0].flatten()[scene.flat_index()]


@dataclass(frozen=True)
class ReceivedAttention(DecoderTap):
    """Attention that visual tokens receive in a decoder layer from their own image and from the text.

    Arrives as `(images, tokens, 2)` float32, head mean: the mean over the rows of the image's patches ("self"), and the
    mean over the rows of all text after the last image ("cross", the last token's where there is none). Under soft
    masks the rows of patches count by their weight. `logits=True` takes "self" before the softmax, as a mean over the
    rows that see the token (causal).
    """

    logits: bool = False

    def measure(self, layer: nn.Module, hidden: torch.Tensor, scene: Scene) -> torch.Tensor:
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

    system: int | None = None

    def measure(self, layer: nn.Module, hidden: torch.Tensor, scene: Scene) -> torch.Tensor:
        layout, real = scene.layout, scene.sequence.asked()
        at, sample = scene.flat_index(), upload(layout.sample, hidden.device)
        visual = torch.zeros(real.numel(), dtype=torch.long, device=real.device)
        visual = visual.scatter_add(0, at.flatten(), layout.alive.long().flatten()).view_as(real) > 0
        text = real & ~visual & ((visual.cumsum(1) > 0) | self.beyond_system(scene, real))
        alone = self.system is None or (scene.sequence.past is None and scene.text_before <= self.system)
        if max(layout.ordinal) == 0 and alone:
            # one image a sample and no text before it: what comes after cannot be seen from it, and the rows of that
            # alone need to be computed
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

    def misfit(self, at: Pixels | Vision | Decoder, facts: ModelFacts) -> str | None:
        if isinstance(at, Decoder) and at.layer == 0:
            return "no decoder layer has run before this cut"
        return misplaced(at) or outside(self.layer, at.layer - 1, "its layer must have run before the cut, one of")

    def measure(self, before: torch.Tensor, after: torch.Tensor, scene: Scene) -> torch.Tensor:
        """From a block's input and output, both `(batch, length, dim)`; the engine adds up a layer's two blocks.

        Args:
            before: what the block read (normalised hidden states).
            after: what it wrote, before the residual is added.
        """
        raise NotImplementedError


class Visible(NamedTuple):
    """What query rows may see: never more than one number per row and key, whatever the product of their numbers.

    Attributes:
        at: `(batch, rows)` long, the column of every row where attention is causal; None where it is not.
        real: `(batch, keys)` bool, keys that are no padding; None if all are.
        window: columns that a causal row sees backwards, itself included; 0 for all.
    """

    at: torch.Tensor | None = None
    real: torch.Tensor | None = None
    window: int = 0


def attention_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    visible: Visible = Visible(),  # noqa: B008 - immutable
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention received by every key: softmax(query key^T * scale + bias), head mean, weighted sum over query rows.

    Args:
        query: `(batch, heads, rows, dim)`.
        key: `(batch, key_heads, keys, dim)`; query heads are grouped over key heads.
        weight: `(batch, rows)` weight of each query row; None is the mean over rows.
        bias: `(batch, keys)` added to the scores on every key, or None.

    Returns:
        `(batch, keys)` in float32 (float64 for float64 input).
    """
    return torch.ops.vlmprune.attention_mass(query, key, scale, *visible, weight, bias)


def mean_logits(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    visible: Visible = Visible(),  # noqa: B008 - immutable
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `attention_mass` without the softmax: weighted mean over the query rows that see a key; `bias` is ignored."""
    query, key = upcast(query), upcast(key)
    batch, heads, rows, _ = query.shape
    keys = key.shape[2]
    key = key[:, :, None].transpose(-1, -2)
    query = query.unflatten(1, (key.shape[1], heads // key.shape[1]))
    weight = query.new_ones(batch, rows) if weight is None else weight.to(query.dtype)
    total = query.new_zeros(batch, keys)
    seen = torch.zeros_like(total)
    for start in range(0, rows, CHUNK):
        part = slice(start, start + CHUNK)
        share = weight[:, part, None].expand(-1, -1, keys)
        at = None if visible.at is None else visible.at[:, part]
        if (may := visible_keys(at, visible.real, visible.window, keys)) is not None:
            share = share * may
        total += ((query[:, :, :, part] @ key).mean((1, 2)) * share).sum(1)
        seen += share.sum(1)
    return total * scale / torch.where(seen > 0, seen, 1)


def cls_logits(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Head mean of the scaled scores of one query, before any softmax.

    Args:
        query: `(..., heads, dim)`; key: `(..., heads, patches, dim)`.

    Returns:
        `(..., patches)`.
    """
    return (upcast(key) @ upcast(query)[..., None]).squeeze(-1).mean(-2) * scale


def distinctness(tokens: torch.Tensor) -> torch.Tensor:
    """Negated cosine of every row of `(..., tokens, dim)` to their mean, `(..., tokens)`."""
    tokens = upcast(tokens)
    return -nn.functional.cosine_similarity(tokens, tokens.mean(-2, keepdim=True), dim=-1)


def split_heads(x: torch.Tensor, dim: int) -> torch.Tensor:
    """`(batch, rows, heads * dim)` -> `(batch, heads, rows, dim)`."""
    return x.unflatten(-1, (-1, dim)).transpose(1, 2)


def take_rows(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Rows `at` `(batch, rows)` of `(batch, length, dim)`."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding in the half-split convention of Llama, Mistral and Qwen2.

    Args:
        x: `(batch, heads, rows, dim)`; cos, sin: `(batch, rows, dim)`.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def sliding_window(attention: nn.Module) -> int | None:
    """The window of a decoder layer's attention in tokens, or None (Mistral keeps it in its config alone)."""
    return getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))


def mean_weight(rows: torch.Tensor) -> torch.Tensor:
    """Weights that average the marked rows of `(batch, length)`."""
    return rows.double() / rows.sum(1, keepdim=True).clamp(min=1)


def last_rows(real: torch.Tensor, counts: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The last `counts` real rows of every sample (at least one), and the weights that average them.

    Args:
        real: `(batch, length)` bool.
        counts: `(batch,)` long.
        most: at least the largest of them.

    Returns:
        `(batch, rows)` long indices and `(batch, rows)` float weights, 0 at padding.
    """
    device, n, most = real.device, counts.clamp(min=1)[:, None], max(1, most)
    column = torch.arange(real.shape[1], device=device).expand_as(real)
    # counted from the end among real rows alone: masked ones may lie between them
    rank = real.flip(1).cumsum(1).flip(1)
    slot = torch.where(real & (rank <= n), n - rank, most)
    rows = column.new_zeros(len(real), most + 1).scatter(1, slot, column)[:, :most]
    inside = torch.arange(most, device=device) < n
    last = torch.where(real, column, 0).amax(1, keepdim=True)  # a row that sees something, at no weight
    return torch.where(inside, rows, last), mean_weight(inside)


def decoder_mass(
    layer: nn.Module,
    hidden: torch.Tensor,
    scene: Scene,
    rows: list[tuple[torch.Tensor, torch.Tensor]],
    measure: Callable[..., torch.Tensor] = attention_mass,
) -> list[torch.Tensor]:
    """Attention mass `(batch, length)` on every key of a decoder layer, for each set of query rows with weights.

    What the layer's cache holds in front of the sequence takes its share.
    """
    attention = layer.self_attn
    normed, (cos, sin) = layer.input_layernorm(hidden), scene.sequence.rotary
    key = rotate(split_heads(attention.k_proj(normed), attention.head_dim), cos, sin)
    past, real = scene.past_keys(layer)
    columns = 0 if past is None else past.shape[2]
    key = key if past is None else torch.cat((past.to(key), key), 2)
    window, masses = sliding_window(attention) or 0, []
    for at, weight in rows:
        query = split_heads(attention.q_proj(take_rows(normed, at)), attention.head_dim)
        query = rotate(query, take_rows(cos, at), take_rows(sin, at))
        seen = Visible(at + columns, real, window)
        masses.append(measure(query, key, attention.scaling, seen, weight, scene.sequence.bias)[:, columns:])
    return masses
