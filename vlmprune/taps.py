"""Taps: what a method asks to see, measured from one layer's input and that layer's own projections.

Attention is recomputed for the rows asked for, in float32, so no layer needs eager attention; what needs all rows is
chunked and never stored as N x N.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    from vlmprune.layout import Layout
    from vlmprune.sequence import Sequence

__all__ = ["DecoderTap", "Hidden", "Tap", "TextAttention", "TowerTap", "VisionAttention", "attention_mass"]

CHUNK = 128  # query rows whose scores exist at one time


class Scene(Protocol):
    """What a decoder tap may look at while it measures: the current sequence and where its visual tokens are."""

    sequence: Sequence
    layout: Layout

    def flat_index(self) -> torch.Tensor:
        """`(images, tokens)` index of every visual token into the flattened `(batch * length)` sequence."""


@dataclass(frozen=True)
class Tap:
    """Base of all taps; a tap is its own key in what `reduce` sees."""


@dataclass(frozen=True)
class TowerTap(Tap):
    """A tap measured at the input of tower layer `layer` (0-based)."""

    layer: int

    def measure(self, layer: nn.Module, hidden: torch.Tensor, has_cls: bool) -> torch.Tensor:
        """From the layer's input `(views, tokens, dim)`; returns `(views, patches, ...)`."""
        raise NotImplementedError


@dataclass(frozen=True)
class DecoderTap(Tap):
    """A tap measured at the input of decoder layer `layer` (0-based): before a cut there, after it for later cuts."""

    layer: int

    def measure(self, layer: nn.Module, hidden: torch.Tensor, scene: Scene) -> torch.Tensor:
        """From the layer's input `(batch, length, dim)`; returns `(images, tokens, ...)`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Hidden(Tap):
    """The visual tokens' own vectors at the cut, `(images, tokens, dim)`: the projected features at `Decoder(0)`."""


@dataclass(frozen=True)
class VisionAttention(TowerTap):
    """Attention of a tower layer: post-softmax, head mean.

    `rows="cls"` is the [CLS] query's row over patch keys; `rows="patches"` the mean over patch queries, so the
    attention each patch receives. Arrives as `(images, tokens)` float32 (newlines and padding are arbitrary).
    """

    rows: Literal["cls", "patches"] = "cls"

    def measure(self, layer: nn.Module, hidden: torch.Tensor, has_cls: bool) -> torch.Tensor:
        attention, first = layer.self_attn, int(has_cls)
        normed = layer.layer_norm1(hidden)
        rows = normed[:, :1] if self.rows == "cls" else normed[:, first:]
        query = split_heads(attention.q_proj(rows), attention.head_dim)
        key = split_heads(attention.k_proj(normed), attention.head_dim)
        return attention_mass(query, key, attention.scale, None, None)[:, first:]


@dataclass(frozen=True)
class TextAttention(DecoderTap):
    """Attention that visual tokens receive in a decoder layer: post-softmax, mean over heads and query rows.

    `rows="last"` is the last prompt token's row, `rows="all"` the mean over every real token's row. Arrives as
    `(images, tokens)` float32.
    """

    rows: Literal["last", "all"] = "last"

    def measure(self, layer: nn.Module, hidden: torch.Tensor, scene: Scene) -> torch.Tensor:
        attention, (batch, length, _) = layer.self_attn, hidden.shape
        columns = torch.arange(length, device=hidden.device)
        mask = scene.sequence.mask
        real = torch.ones(batch, length, dtype=torch.bool, device=hidden.device) if mask is None else mask
        normed = layer.input_layernorm(hidden)
        cos, sin = scene.sequence.rotary
        if self.rows == "last":
            at, weight = torch.where(real, columns, 0).amax(1, keepdim=True), None
        else:
            at, weight = columns.expand(batch, -1), real / real.sum(1, keepdim=True)
        query = split_heads(attention.q_proj(take_rows(normed, at)), attention.head_dim)
        query = rotate(query, take_rows(cos, at), take_rows(sin, at))
        key = rotate(split_heads(attention.k_proj(normed), attention.head_dim), cos, sin)
        visible = (columns <= at[..., None]) & real[:, None]
        if (window := sliding_window(attention)) is not None:
            visible &= columns > at[..., None] - window
        mass = attention_mass(query, key, attention.scaling, visible[:, None], weight)
        return mass.flatten()[scene.flat_index()]


def upcast(x: torch.Tensor) -> torch.Tensor:
    """Float32, or float64 where the model computes in it."""
    return x if x.dtype == torch.float64 else x.float()


def attention_mass(
    query: torch.Tensor, key: torch.Tensor, scale: float, visible: torch.Tensor | None, weight: torch.Tensor | None
) -> torch.Tensor:
    """Attention received by every key: softmax(query key^T * scale), head mean, weighted sum over query rows.

    Args:
        query: `(batch, heads, rows, dim)`.
        key: `(batch, key_heads, keys, dim)`; query heads are grouped over key heads.
        visible: `(batch, 1, rows, keys)` bool, or None for all.
        weight: `(batch, rows)` weight of each query row; None is the mean over rows.

    Returns:
        `(batch, keys)` in float32 (float64 for float64 input). Scores exist for `CHUNK` rows at a time.
    """
    query, key = upcast(query), upcast(key)
    batch, heads, rows, _ = query.shape
    key = key[:, :, None].transpose(-1, -2)
    query = query.unflatten(1, (key.shape[1], heads // key.shape[1]))
    weight = query.new_full((batch, rows), 1 / rows) if weight is None else weight.to(query.dtype)
    mass = query.new_zeros(batch, key.shape[-1])
    for start in range(0, rows, CHUNK):
        part = slice(start, start + CHUNK)
        logits = query[:, :, :, part] @ key * scale
        if visible is not None:
            logits = logits.masked_fill(~visible[:, None, :, part], torch.finfo(logits.dtype).min)
        mean = logits.softmax(-1).mean((1, 2))
        mass += (mean * weight[:, part, None]).sum(1)
    return mass


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
