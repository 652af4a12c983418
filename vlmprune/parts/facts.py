"""What methods know of a model: numbers, and no module."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ModelFacts"]


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
