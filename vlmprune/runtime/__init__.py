"""Running models for a user: shared by Python, the commands and the evaluation."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

from vlmprune._compat import check_transformers

__all__ = ["from_pretrained", "load"]


def load(
    name: str | os.PathLike[str], *, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> tuple[nn.Module, Any]:
    """Load a model that can be patched, and its processor.

    Args:
        name: an embedded model (`scene-llava`, `scene-llava-next`, `scene-qwen`: they come with the package), a folder,
            or an id on the hub. Nothing is downloaded but for an id.
        device: "cpu", "cuda", "cuda:N" (as text or torch's), or "auto", which is the GPU where there is one.
        dtype: "float32", "bfloat16", "float16" (as text or torch's), or "auto", which is the checkpoint's own on a GPU
            and float32 on a CPU.

    Returns:
        (model in eval mode, processor).

    Raises:
        ValueError: no such model or device, or a model of a family that is not supported; the message says which.
        ImportError: another transformers than vlmprune was tested with.
    """
    check_transformers()
    from vlmprune.runtime import loading
    from vlmprune.runtime.errors import UserError

    kind = str(dtype).removeprefix("torch.")
    if kind not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"unknown dtype {dtype!r}: auto, float32, bfloat16 or float16.")
    try:
        loaded = loading.open_model(os.fspath(name), str(device), kind)
    except UserError as error:
        raise ValueError(str(error)) from error
    return loaded.model, loaded.processor


def from_pretrained(
    name: str | os.PathLike[str], *, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> tuple[nn.Module, Any]:
    """Load a model, its processor and the recipe beside it (`Handle.save_pretrained`), and patch the model by it.

    Args:
        name: a folder, or an id on the hub, with a recipe (vlmprune.yaml) beside the model.
        device, dtype: as of `load`.

    Returns:
        (patched model in eval mode, processor).

    Raises:
        ValueError: as `load`; no recipe there, or one that is not understood.
        UnsupportedError: the recipe is for another family of models.
    """
    from vlmprune.api import patch
    from vlmprune.runtime import pretrained

    recipe = pretrained.recipe_beside(os.fspath(name))
    model, processor = load(name, device=device, dtype=dtype)
    patch(model, recipe)
    return model, processor
