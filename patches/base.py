"""What the engine must know of a model family, and the parts that families share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from vlmprune.errors import UnsupportedError
from vlmprune.layout import ImageGrid, trace_packing

__all__ = ["Family", "ModelFacts"]

TOWERS = {"clip_vision_model": True, "siglip_vision_model": False}  # model_type -> has a [CLS] token
LANGUAGE_MODELS = ("llama", "mistral", "qwen2")


@dataclass(frozen=True)
class ModelFacts:
    """The facts about a model that methods choose their layers by.

    Attributes:
        family: the model's `model_type`.
        tower_layers: number of layers of the vision tower.
        feature_layer: 0-based tower layer whose output becomes the visual features.
        has_cls: whether the tower has a [CLS] token.
        decoder_layers: number of layers of the language model.
        views: whether one image may have several views (thumbnail and crops).
        view_patches: patches of one view.
    """

    family: str
    tower_layers: int
    feature_layer: int
    has_cls: bool
    decoder_layers: int
    views: bool
    view_patches: int


class Family:
    """One Hugging Face `model_type`: where its parts are and how it packs views into visual tokens.

    A new family overrides `model_type`, and what differs of `grid`, `pack` and `needs_sizes`.
    """

    model_type: ClassVar[str]
    title: ClassVar[str]
    views: ClassVar[bool] = False
    needs_sizes: ClassVar[bool] = False  # whether the packing depends on the image's size

    def inner(self, model: nn.Module) -> nn.Module:
        """The module that joins tower, projector and language model (`LlavaModel`): itself, or inside `model`."""
        return model if hasattr(model, "language_model") and hasattr(model, "vision_tower") else model.model

    def tower(self, inner: nn.Module) -> nn.Module:
        return inner.vision_tower

    def tower_layers(self, inner: nn.Module) -> nn.ModuleList:
        return inner.vision_tower.encoder.layers

    def language_model(self, inner: nn.Module) -> nn.Module:
        return inner.language_model

    def decoder_layers(self, inner: nn.Module) -> nn.ModuleList:
        return inner.language_model.layers

    def image_token(self, inner: nn.Module) -> int:
        return inner.config.image_token_id

    def side(self, inner: nn.Module) -> int:
        """Patches along one side of a view."""
        vision = inner.config.vision_config
        return vision.image_size // vision.patch_size

    def facts(self, inner: nn.Module) -> ModelFacts:
        """Check that the model is one we know, and return its facts.

        Raises:
            UnsupportedError: an unknown tower or language model, or an unsupported feature selection.
        """
        config = inner.config
        tower, text = config.vision_config.model_type, config.text_config.model_type
        if tower not in TOWERS:
            raise UnsupportedError(f"vision tower {tower!r} is not supported; supported: {', '.join(TOWERS)}.")
        if text not in LANGUAGE_MODELS:
            raise UnsupportedError(
                f"language model {text!r} is not supported; supported: {', '.join(LANGUAGE_MODELS)}."
            )
        has_cls, strategy = TOWERS[tower], config.vision_feature_select_strategy
        if has_cls and strategy != "default":
            raise UnsupportedError(
                f"vision_feature_select_strategy={strategy!r} makes the tower's [CLS] token a visual token, which is "
                "not supported; use 'default'."
            )
        if not has_cls and strategy != "full":
            raise UnsupportedError(
                f"vision_feature_select_strategy={strategy!r} drops the first patch of a tower without a [CLS] token; "
                "use 'full'."
            )
        layers, feature = len(self.tower_layers(inner)), config.vision_feature_layer
        if not isinstance(feature, int):  # several layers are concatenated; the deepest leads
            feature = max(f if f >= 0 else layers + 1 + f for f in feature)
        # hidden_states has one entry more than there are layers: entry i is the output of layer i - 1
        feature = (feature if feature >= 0 else layers + 1 + feature) - 1
        return ModelFacts(
            family=self.model_type,
            tower_layers=layers,
            feature_layer=max(feature, 0),
            has_cls=has_cls,
            decoder_layers=len(self.decoder_layers(inner)),
            views=self.views,
            view_patches=self.side(inner) ** 2,
        )

    def grid(self, inner: nn.Module, size: tuple[int, int] | None) -> tuple[int, tuple[int, int]]:
        """Views of an image of `size` (height, width), and its (vertical, horizontal) number of crops."""
        return 1, (1, 1)

    def pack(self, inner: nn.Module, views: torch.Tensor, newline: torch.Tensor, size: Any) -> torch.Tensor:
        """Pack `(views, patches, dim)` of one image into `(tokens, dim)` exactly as the model does."""
        return views[0]

    def image_grid(self, inner: nn.Module, size: tuple[int, int] | None) -> ImageGrid:
        """The layout of one image, traced through `pack`."""
        views, grid = self.grid(inner, size)
        side = self.side(inner)
        return trace_packing(lambda x, newline: self.pack(inner, x, newline, size), views, side, side, grid)
