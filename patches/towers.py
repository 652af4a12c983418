"""Kinds of layers of vision towers: how each makes norm, queries and keys, by its own modules."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from vlmprune.errors import UnsupportedError
from vlmprune.parts.attention import split_heads

__all__ = ["TOWERS", "ClipLayer", "tower_layer"]

#: `model_type` of the towers -> whether they have a [CLS] token.
TOWERS = {
    "clip_vision_model": True,
    "siglip_vision_model": False,
    "internvl_vision": True,
    "pixtral": False,
    "smolvlm_vision": False,
    "idefics3_vision": False,
    "ovis2_vision": False,
}


@dataclass(frozen=True)
class ClipLayer:
    """A layer of CLIP's build: `layer_norm1`, `self_attn` with `q_proj` and `k_proj`, `layer_norm2`, `mlp`."""

    module: nn.Module

    @property
    def attention(self) -> nn.Module:
        """The attention block."""
        return self.module.self_attn

    @property
    def feed_forward(self) -> nn.Module:
        """The block behind it."""
        return self.module.mlp

    @property
    def key_projection(self) -> nn.Module:
        """The module whose output the keys are, all heads side by side."""
        return self.attention.k_proj

    @property
    def scale(self) -> float:
        return self.attention.scale

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.module.layer_norm1(hidden)

    def queries(self, rows: torch.Tensor) -> torch.Tensor:
        return split_heads(self.attention.q_proj(rows), self.attention.head_dim)

    def keys(self, rows: torch.Tensor) -> torch.Tensor:
        return split_heads(self.attention.k_proj(rows), self.attention.head_dim)


@dataclass(frozen=True)
class InternVLLayer(ClipLayer):
    """A layer of InternVL's tower: other names, and norms over all heads together that some checkpoints have."""

    @property
    def attention(self) -> nn.Module:
        return self.module.attention

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.module.layernorm_before(hidden)

    def queries(self, rows: torch.Tensor) -> torch.Tensor:
        return split_heads(self.attention.q_norm(self.attention.q_proj(rows)), self.attention.head_dim)

    def keys(self, rows: torch.Tensor) -> torch.Tensor:
        return split_heads(self.attention.k_norm(self.attention.k_proj(rows)), self.attention.head_dim)


@dataclass(frozen=True)
class Ovis2Layer(ClipLayer):
    """A layer of Ovis2's tower: other names alone."""

    @property
    def attention(self) -> nn.Module:
        return self.module.attention

    @property
    def feed_forward(self) -> nn.Module:
        return self.module.ffn

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.module.rms_norm1(hidden)


LAYERS: dict[str, type[ClipLayer]] = {
    "CLIPEncoderLayer": ClipLayer,
    "SiglipEncoderLayer": ClipLayer,
    "InternVLVisionLayer": InternVLLayer,
    "SmolVLMEncoderLayer": ClipLayer,
    "Idefics3EncoderLayer": ClipLayer,
    "Ovis2VisionEncoderLayer": Ovis2Layer,
}


def tower_layer(module: nn.Module) -> ClipLayer:
    """What is known of a tower layer.

    Raises:
        UnsupportedError: a layer of another class.
    """
    for cls in type(module).__mro__:
        if cls.__name__ in LAYERS:
            return LAYERS[cls.__name__](module)
    raise UnsupportedError(
        f"this patch looks into layers of the vision tower, and {type(module).__name__} is not one that is known "
        f"({', '.join(LAYERS)}): take a method that does not look at the tower."
    )
