"""PixelPrune (arXiv 2604.00886; code OPPO-Mente-Lab/PixelPrune), in its exact mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmprune.methods.base import AnyCut, Cut, Decoder, Layout, Method, ModelFacts, Reduction, Seen, register
from vlmprune.parts import Kept, PatchCut, keep_patches

__all__ = ["PixelPrune", "unpredicted"]


def unpredicted(pixels: torch.Tensor) -> torch.Tensor:
    """`(frames, rows, columns)` bool of the tokens whose pixels are not those that their neighbours predict.

    The prediction is the token above where the one above left equals the one to the left, and not the one above; else
    the one to the left. The first row has a left one alone, the first column one above, the very first none.

    Args:
        pixels: `(frames, rows, columns, numbers)`.
    """
    left = pixels.new_zeros(pixels.shape[:-1], dtype=torch.bool)
    above, turns = left.clone(), left.clone()
    left[:, :, 1:] = (pixels[:, :, 1:] == pixels[:, :, :-1]).all(-1)
    above[:, 1:] = (pixels[:, 1:] == pixels[:, :-1]).all(-1)
    turns[:, 1:, 1:] = above[:, 1:, :-1] & ~left[:, :-1, 1:]
    turns[:, 1:, 0] = True
    return ~torch.where(turns, above, left)


@register("pixelprune")
@dataclass(frozen=True)
class PixelPrune(Method):
    """Drop every token whose pixels are exactly what those of its neighbours predict, before the tower reads it.

    No pixel is lost: what is kept tells the picture back, value by value, in raster order. The answer may still be
    another one, as tower and language model see fewer tokens. What is kept keeps its places in both. Frames of a video
    are predicted each by itself. The picture decides how many stay: in photographs all.
    """

    summary = "documents and screens without what repeats, pixel by pixel, before the tower (Qwen-VL)"
    paper = "arXiv 2604.00886"
    needs = "pixels"
    looks_at = "features"
    stage = "before the vision tower"
    syncs = 3
    refuses: ClassVar[dict[str, str]] = {
        "tau": "above 0 pixels are lost, and where it was measured in a server fewer tokens gave fewer requests a "
        "second; the exact mode alone is offered.",
        "keep": "what repeats is dropped and nothing else: the picture decides how many tokens stay. A method of the "
        "language model beside it takes a budget, as in patch(model, ['pixelprune', DivPrune(keep=64)]).",
    }

    def cuts(self, facts: ModelFacts) -> list[AnyCut]:
        return [PatchCut(self.pick), Cut(Decoder(0), (Kept(),), self.drop)]

    def pick(self, pixels: torch.Tensor, sizes: list[tuple[int, int, int]]) -> torch.Tensor:
        """Pure: the pixels of all tokens in, who stays out."""
        parts = pixels.split([frames * rows * cols for frames, rows, cols in sizes])
        kept = [unpredicted(part.unflatten(0, size)).flatten() for part, size in zip(parts, sizes, strict=True)]
        return torch.cat(kept)

    def drop(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: keep what the tower has read."""
        return keep_patches(seen[Kept()] & layout.patches, layout, None, "all")
