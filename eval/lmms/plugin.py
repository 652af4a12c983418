"""What lmms-eval finds through its entry point group `lmms_eval.models`: the model `vlmprune`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

__all__ = ["manifests"]


def manifests() -> list[ModelManifest]:
    """The models we publish; called by lmms-eval, and nothing heavy is imported before one is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(model_id="vlmprune", chat_class_path="vlmprune.eval.lmms.model.VlmPrune")]
