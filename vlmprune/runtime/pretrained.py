"""The recipe beside a model, in a folder or on the hub."""

from __future__ import annotations

from pathlib import Path

from vlmprune.recipe import FILE, read_recipe
from vlmprune.runtime import interruption
from vlmprune.runtime.errors import UserError, brief

__all__ = ["recipe_beside"]


def recipe_beside(name: str) -> Path:
    """The file of the recipe that belongs to a model; read once, so that a mistake in it is told before weights load.

    Raises:
        ValueError: no such model, no recipe beside it, or one that is not understood.
    """
    from vlmprune.runtime.loading import find_model

    try:
        source = find_model(name)
    except UserError as error:
        raise ValueError(str(error)) from error
    path = Path(source.adapter or source.place) / FILE if source.local else fetched(source.place)
    if not path.is_file():
        raise ValueError(
            f"{name} has no recipe ({FILE}) beside the model: handle.save_pretrained writes one, and vlmprune.load "
            "loads a model without."
        )
    read_recipe(path)
    return path


def fetched(name: str) -> Path:
    """The file from the hub, or where it would be."""
    from transformers.utils import cached_file

    try:
        found = cached_file(name, FILE, _raise_exceptions_for_missing_entries=False)
    except Exception as error:  # the hub raises nearly anything
        interruption.check(error)
        raise ValueError(f"cannot look for a recipe of {name} on the hub: {brief(error)}") from error
    return Path(found or FILE + ".missing")
