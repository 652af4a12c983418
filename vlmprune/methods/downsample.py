"""A control: a picture with less detail, which is a smaller one where towers read pictures of any size."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import interpolate

from vlmprune.methods.base import Budgeted, ModelFacts, register
from vlmprune.parts import PixelCut, need_views

__all__ = ["Downsample"]


@register("downsample")
@dataclass(frozen=True)
class Downsample(Budgeted):
    """Shrink the picture and enlarge it again: as many pixels as the budget has patches, but all the tokens.

    It saves nothing; it tells how much of a task needs detail at all, so it stands apart from methods in every table.

    Where a processor bounds the pixels of pictures of any size (Qwen-VL) it is the picture itself that is smaller: as
    many tokens as the budget has, or the few less that its sides allow, in the tower too. The processor does it, before
    the model is called: `vlmprune run`, `fidelity` and `eval` see to it, and `vlmprune.patch` refuses.

    Args:
        keep, average: fraction of the pixels (an int is taken of one view's patches).
    """

    summary = "the picture shrunk and enlarged again, all tokens (control; on Qwen-VL a smaller picture, fewer tokens)"
    stage = "pixels"
    looks_at = "nothing"

    def cuts(self, facts: ModelFacts) -> list[PixelCut]:
        way_out = "give its processor a smaller bound of pixels, as `vlmprune run`, `fidelity` and `eval` do on Qwen-VL"
        need_views(self.name, facts, way_out)
        budget = self.budget
        share = budget if isinstance(budget, float) else min(1.0, budget / facts.view_patches)
        return [] if share == 1 else [PixelCut(partial(self.shrink, share=share))]

    def told_by(self, processor: Any) -> Downsample:
        made_for = getattr(getattr(processor, "image_processor", None), "budget", None)
        return self.done() if made_for == self.budget else self

    def done(self) -> Downsample:
        """This control where the processor makes the pictures smaller, and nothing is left to do."""
        return Downsampled(keep=self.keep, average=self.average)

    def shrink(self, pixels: torch.Tensor, share: float) -> torch.Tensor:
        """Pure: `(views, channels, height, width)` in and out, with `share` of the pixels' information."""
        resize = partial(interpolate, mode="bilinear", antialias=True)
        small = [max(1, round(n * share**0.5)) for n in pixels.shape[-2:]]
        if small == list(pixels.shape[-2:]):
            told = f"downsample changes nothing: {share:.4g} of {small[0]} x {small[1]} pixels are all of them."
            warnings.warn(told, stacklevel=2)
            return pixels
        return resize(resize(pixels.float(), small), pixels.shape[-2:]).to(pixels.dtype)


@dataclass(frozen=True)
class Downsampled(Downsample):
    """`downsample` of a picture that is smaller already."""

    def cuts(self, facts: ModelFacts) -> list[PixelCut]:
        return []
