"""Smaller pictures for models that read them in any size: what `downsample` is there.

The rival that costs nothing to write: the processor's `max_pixels`, set for every picture to as many tokens as the
budget leaves. The vision tower then has less to do as well, which no method that prunes behind it can say.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from vlmprune.methods.base import Method
from vlmprune.methods.downsample import Downsample
from vlmprune.parts.budget import count
from vlmprune.runtime.errors import UserError

if TYPE_CHECKING:
    from vlmprune.patches import Family

__all__ = ["SAID", "FewerPixels", "fitted"]

SAID = "fewer pixels"  # beside `downsample`, in tables


class FewerPixels:
    """An image processor that makes every picture at most so many tokens large, by the real one.

    Args:
        whole: the model's image processor, one of packed pictures.
        budget: tokens per picture, or a fraction of its own.
    """

    def __init__(self, whole: Any, budget: int | float):
        self.whole, self.budget = whole, budget

    def __getattr__(self, name: str) -> Any:
        if name == "whole":  # while it is copied
            raise AttributeError(name)
        return getattr(self.whole, name)

    def __call__(self, images: Any, **given: Any) -> dict[str, torch.Tensor]:
        """Pixels `(patches, values)` and `image_grid_thw` of pictures, in whatever lists."""
        from transformers.image_utils import make_flat_list_of_images

        made = [self.one(image, **given | {"return_tensors": "pt"}) for image in make_flat_list_of_images(images)]
        return {name: torch.cat([each[name] for each in made]) for name in ("pixel_values", "image_grid_thw")}

    def one(self, image: Any, **given: Any) -> Any:
        """What the real one makes of a picture under a smaller bound."""
        whole, edge = self.tokens(image), self.whole.patch_size * self.whole.merge_size
        left = count(self.budget, whole)
        if left < whole:
            given["size"] = {"shortest_edge": edge**2, "longest_edge": left * edge**2}
        return self.whole(images=[image], **given)

    def tokens(self, image: Any) -> int:
        """Tokens of a picture as the model is meant to see it."""
        return int(self.whole.get_number_of_image_patches(image.height, image.width, {})) // self.whole.merge_size**2


def fitted(processor: Any, methods: Sequence[Method], family: Family) -> Any:
    """The processor that prepares what methods are to see: itself, or, for `downsample` where it bounds pixels, a copy.

    Raises:
        UserError: `downsample` twice.
    """
    budgets = [method.budget for method in methods if isinstance(method, Downsample)]
    if not family.bounds_pixels or not budgets:
        return processor
    if len(budgets) > 1:
        raise UserError("downsample stands twice: a picture is made smaller once.")
    made = copy.copy(processor)
    made.image_processor = FewerPixels(processor.image_processor, budgets[0])
    return made
