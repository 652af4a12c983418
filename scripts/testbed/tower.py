"""The vision tower's configuration, and the heads that supervise it while it is trained."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel

from .scenes import GRID, PATCH, TILE
from .targets import IGNORE, NO_COLOUR, NO_VALUE

#: Mean and standard deviation of the pixels' scale, the same for all channels; also in the image processor.
PIXEL_MEAN, PIXEL_STD = 0.5, 0.25


def tower_config() -> CLIPVisionConfig:
    """256 patch tokens and a CLS token; with LLaVA's feature layer -2 the language model sees layer 4 of 5."""
    config = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=TILE,
        patch_size=PATCH,
        projection_dim=128,
        hidden_act="gelu_pytorch_tanh",
    )
    config._attn_implementation = "eager"
    return config


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """(B, 128, 128, 3) uint8 -> (B, 3, 128, 128) float32, as the image processor does."""
    return (pixels.permute(0, 3, 1, 2).float() / 255 - PIXEL_MEAN) / PIXEL_STD


class SupervisedTower(nn.Module):
    """A CLIP vision tower with classification heads on its patch tokens and its CLS token."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = CLIPVisionModel(tower_config())
        width = self.tower.config.hidden_size
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.patch_head = nn.Linear(width, NO_COLOUR + 1 + NO_VALUE + 1)
        self.position_head = nn.Linear(width, 2 * GRID + 4)
        self.middle_cls_head = nn.Linear(width, 4 * (NO_COLOUR + NO_VALUE + 2))
        self.last_cls_head = nn.Linear(width, 4 * (NO_COLOUR + NO_VALUE + 2))

    def states(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The features (B, 257, 128) at layer -2, and the last layer's CLS state (B, 128).

        The last layer is computed for the CLS token alone: nothing reads its patch tokens.
        """
        hidden = self.tower.pre_layrnorm(self.tower.embeddings(pixel_values))
        *layers, last = self.tower.encoder.layers
        for layer in layers:
            hidden = layer(hidden, None)
        attention = last.self_attn
        normed = last.layer_norm1(hidden)
        split = (normed.shape[0], -1, attention.num_heads, attention.head_dim)
        query = attention.q_proj(normed[:, :1]).view(split).transpose(1, 2)
        key = attention.k_proj(normed).view(split).transpose(1, 2)
        value = attention.v_proj(normed).view(split).transpose(1, 2)
        weights = ((query * attention.scale) @ key.transpose(-1, -2)).float().softmax(-1).to(value.dtype)
        mixed = (weights @ value).transpose(1, 2).reshape(normed.shape[0], -1)
        cls = hidden[:, 0] + attention.out_proj(mixed)
        cls = cls + last.mlp(last.layer_norm2(cls))
        return hidden, self.tower.post_layernorm(cls)

    def logits(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """All heads: patch (B, 256, 22), position (B, 256, 36), middle and last CLS (B, 4, 22)."""
        hidden, last = self.states(pixel_values)
        normed = self.norm(hidden)
        return {
            "patch": self.patch_head(normed[:, 1:]).float(),
            "position": self.position_head(normed[:, 1:]).float(),
            "middle": self.middle_cls_head(normed[:, 0]).float().unflatten(-1, (4, -1)),
            "last": self.last_cls_head(last).float().unflatten(-1, (4, -1)),
        }

    def forward(self, pixel_values: torch.Tensor, patches: torch.Tensor, cls: torch.Tensor) -> dict[str, torch.Tensor]:
        """The losses by name; `total` is their weighted sum."""
        out = self.logits(pixel_values)
        kinds = NO_COLOUR + 1
        objects = patches[:, 0] != NO_COLOUR  # (B, 256)
        losses = {}
        for name, logits, target, empty in (
            ("colour", out["patch"][..., :kinds], patches[:, 0], NO_COLOUR),
            ("value", out["patch"][..., kinds:], patches[:, 1], NO_VALUE),
        ):
            each = functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
            background = target == empty
            losses[name] = (each * objects).sum() / objects.sum().clamp(min=1)
            losses[name + "_background"] = (each * background).sum() / background.sum().clamp(min=1)
        index = torch.arange(GRID * GRID)
        rows, columns = index // GRID, index % GRID
        places = 2 * (rows >= GRID // 2) + (columns >= GRID // 2)
        position = out["position"].mT  # (B, 36, 256)
        for name, logits, target in (
            ("row", position[:, :GRID], rows),
            ("column", position[:, GRID : 2 * GRID], columns),
            ("place", position[:, 2 * GRID :], places),
        ):
            losses[name] = functional.cross_entropy(logits, target.expand(len(position), -1))
        for name in ("middle", "last"):
            logits = out[name].permute(0, 2, 1)  # (B, 22, 4)
            losses[name] = functional.cross_entropy(logits[:, :kinds], cls[:, 0], ignore_index=IGNORE)
            losses[name] = losses[name] + functional.cross_entropy(logits[:, kinds:], cls[:, 1], ignore_index=IGNORE)
        weights = {"row": 0.15, "column": 0.15, "place": 0.3, "middle": 0.8, "last": 0.4}
        weights |= {"colour_background": 0.5, "value_background": 0.5}
        losses["total"] = sum(weights.get(k, 1.0) * v for k, v in losses.items())
        return losses


def cls_attention(tower: CLIPVisionModel, pixel_values: torch.Tensor, layer: int) -> torch.Tensor:
    """Head-averaged attention of the CLS token to the patches in one layer: (B, 256)."""
    hidden = tower.pre_layrnorm(tower.embeddings(pixel_values))
    for block in tower.encoder.layers[:layer]:
        hidden = block(hidden, None)
    block = tower.encoder.layers[layer]
    normed, attention = block.layer_norm1(hidden), block.self_attn
    split = (normed.shape[0], -1, attention.num_heads, attention.head_dim)
    query = attention.q_proj(normed[:, :1]).view(split).transpose(1, 2)
    key = attention.k_proj(normed).view(split).transpose(1, 2)
    weights = (query * attention.scale) @ key.transpose(-1, -2)
    return weights.float().softmax(-1).mean(1)[:, 0, 1:]
