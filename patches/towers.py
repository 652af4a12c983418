"""Kinds of layers of vision towers: how each makes norm, queries and keys, by its own modules."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.nn.functional import avg_pool2d

from vlmprune.parts.layers import TowerLayer
from vlmprune.patches.layers import HostLayer, kind_of

__all__ = ["TOWERS", "ClipLayer", "RotaryTowerLayer", "packed_views", "pooled", "tower_layer"]

#: `model_type` of the towers -> whether they have a [CLS] token.
TOWERS = {
    "clip_vision_model": True,
    "siglip_vision_model": False,
    "internvl_vision": True,
    "pixtral": False,
    "smolvlm_vision": False,
    "idefics3_vision": False,
    "ovis2_vision": False,
    "qwen2_vl_vision": False,
    "qwen2_5_vl_vision": False,
    "qwen3_vl_vision": False,
    "qwen3_vl_moe_vision": False,
    "glm4v_vision": False,
    "qwen3_5_vision": False,
}


@dataclass(frozen=True)
class ClipLayer(HostLayer):
    """A layer of CLIP's build, with `q_proj` and `k_proj`."""

    names = ("self_attn", "mlp", "layer_norm1")

    @property
    def query_projection(self) -> nn.Module:
        """The module whose output the queries are, all heads side by side."""
        return self.attention.q_proj

    @property
    def key_projection(self) -> nn.Module:
        """The same of the keys."""
        return self.attention.k_proj

    @property
    def value_projection(self) -> nn.Module:
        """The same of the values."""
        return self.attention.v_proj

    @property
    def scale(self) -> float:
        return self.attention.scale

    def queries(self, rows: torch.Tensor) -> torch.Tensor:
        return self.heads(self.attention.q_proj(rows))

    def keys(self, rows: torch.Tensor) -> torch.Tensor:
        return self.heads(self.attention.k_proj(rows))


@dataclass(frozen=True)
class InternVLLayer(ClipLayer):
    """A layer of InternVL's tower, with norms over all heads together that some checkpoints have."""

    names = ("attention", "mlp", "layernorm_before")

    def queries(self, rows: torch.Tensor) -> torch.Tensor:
        return self.heads(self.attention.q_norm(self.attention.q_proj(rows)))

    def keys(self, rows: torch.Tensor) -> torch.Tensor:
        return self.heads(self.attention.k_norm(self.attention.k_proj(rows)))


@dataclass(frozen=True)
class Ovis2Layer(ClipLayer):
    """A layer of Ovis2's tower: other names alone."""

    names = ("attention", "ffn", "rms_norm1")


@dataclass(frozen=True)
class RotaryTowerLayer(HostLayer):
    """A layer of Qwen-VL's build, with one projection for all.

    Attributes:
        rotary: (cos, sin) of what it reads, each `(views, tokens, head dim)`.
    """

    names = ("attn", "mlp", "norm1")
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def scale(self) -> float:
        return self.attention.scaling

    def queries(self, rows: torch.Tensor) -> torch.Tensor:
        return self.rotated(rows, 0)

    def keys(self, rows: torch.Tensor) -> torch.Tensor:
        return self.rotated(rows, 1)

    def rotated(self, rows: torch.Tensor, which: int) -> torch.Tensor:
        """Queries (0) or keys (1) of all rows, by the rotary embedding of the attention's own module."""
        heads = self.attention.qkv(rows).unflatten(-1, (3, self.attention.num_heads, -1))[..., which, :, :]
        rotate: Callable = sys.modules[type(self.attention).__module__].apply_rotary_pos_emb_vision
        return rotate(heads, heads[..., :1, :], *self.rotary)[0].transpose(-2, -3)


@dataclass(frozen=True)
class PixtralLayer(RotaryTowerLayer):
    """A layer of Pixtral's tower, with a projection for each."""

    names = ("attention", "feed_forward", "attention_norm")

    def rotated(self, rows: torch.Tensor, which: int) -> torch.Tensor:
        projection = (self.attention.q_proj, self.attention.k_proj)[which]
        heads = self.heads(projection(rows))
        rotate: Callable = sys.modules[type(self.attention).__module__].apply_rotary_pos_emb
        return rotate(heads, heads[:, :1], *self.rotary)[0]


def pooled(values: torch.Tensor, shape: tuple[int, int], unit: int) -> torch.Tensor:
    """Values of patches `(views, patches, ...)` in a raster as means over the squares of `unit` x `unit` in it."""
    raster = values.reshape(len(values), *shape, -1).movedim(-1, 1)
    return avg_pool2d(raster, unit).flatten(2).transpose(1, 2).reshape(len(values), -1, *values.shape[2:])


LAYERS: dict[str, Callable] = {
    "CLIPEncoderLayer": ClipLayer,
    "SiglipEncoderLayer": ClipLayer,
    "InternVLVisionLayer": InternVLLayer,
    "SmolVLMEncoderLayer": ClipLayer,
    "Idefics3EncoderLayer": ClipLayer,
    "Ovis2VisionEncoderLayer": Ovis2Layer,
    "PixtralAttentionLayer": PixtralLayer,
    "Qwen2VLVisionBlock": RotaryTowerLayer,
    "Qwen2_5_VLVisionBlock": RotaryTowerLayer,
    "Qwen3VLVisionBlock": RotaryTowerLayer,
    "Qwen3VLMoeVisionBlock": RotaryTowerLayer,
    "Glm4vVisionBlock": RotaryTowerLayer,
    "Qwen3_5VisionBlock": RotaryTowerLayer,
}


def packed_views(
    module: nn.Module, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], patches: Iterable[int]
) -> list[tuple[TowerLayer, torch.Tensor]]:
    """A layer that reads views of several sizes as one sequence: its adapter and its input for views of one size each.

    Args:
        hidden: `(patches of all, dim)`.
        rotary: (cos, sin), each `(patches of all, head dim)`.
        patches: of every view, in order.
    """
    views, start = [], 0
    for size, equal in groupby(patches):
        count = len(list(equal))
        here = slice(start, start := start + count * size)
        part, *turn = (x[here].unflatten(0, (count, size)) for x in (hidden, *rotary))
        views.append((tower_layer(module, tuple(turn)), part))
    return views


def tower_layer(module: nn.Module, *given: Any) -> TowerLayer:
    """What is known of a tower layer.

    Args:
        given: what its adapter must know of a call.

    Raises:
        UnsupportedError: a layer of another class.
    """
    looks, way = "layers of the vision tower", "does not look at the tower"
    return kind_of(LAYERS, module, looks, way)(module, *given)
