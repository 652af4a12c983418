"""Tokens that a method chooses otherwise in a batch than alone: a tie that rounding decides, or a mistake."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from vlmprune.trace import CutTrace
from vlmprune.verify.verdict import Noise, tolerance, worst

__all__ = ["CLOSE_CALL", "Differing", "differing"]

FEW = 0.1  # the share of kept tokens up to which a difference is not held against a method whose scores tell nothing
CLOSE_CALL = "scores may be too close to call"


@dataclass(frozen=True)
class Differing:
    """The first cut at which a prompt keeps other tokens in a batch than alone.

    Attributes:
        alone, together: what the cut did; the batch's is that of the prompt's images.
        moved, total: tokens that all cuts exchanged, and that they kept alone.
    """

    alone: CutTrace
    together: CutTrace
    moved: int
    total: int

    @property
    def told(self) -> str:
        """How many, in words."""
        return f"{self.moved} of {self.total} kept tokens are others than alone"

    @property
    def few(self) -> bool:
        """Whether rounding may have exchanged as many."""
        return 0 < self.moved <= max(1, FEW * self.total)

    def scores(self, image: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The finite scores of an image, alone and in the batch (0 for others, as dropped tokens may have)."""
        width = min(self.alone.keep.shape[1], self.together.keep.shape[1])
        both = [cut.scores[image, :width].double() for cut in (self.alone, self.together)]
        known = both[0].isfinite() & both[1].isfinite()
        return both[0].where(known, 0.0), both[1].where(known, 0.0)

    @property
    def gap(self) -> float:
        """How far apart the exchanged tokens' scores are alone: the best given up above the worst taken instead."""
        gaps = [0.0]
        for image in range(len(self.alone.keep)):
            scores, _ = self.scores(image)
            a, b = (cut.keep[image, : len(scores)] for cut in (self.alone, self.together))
            if (a & ~b).any() and (b & ~a).any():
                gaps.append(float(scores[a & ~b].max() - scores[b & ~a].min()))
        return max(gaps)

    def tie(self, noise: Noise, dtype: torch.dtype) -> bool:
        """Whether rounding explains it: it moved the scores, by no more than it may, and the gap is within that."""
        if self.alone.scores is None or self.together.scores is None:
            return False
        if not torch.equal(self.alone.keep.sum(1), self.together.keep.sum(1)):
            return False  # no exchange: a number of tokens that depends on a threshold
        for image in range(len(self.alone.keep)):
            alone, together = self.scores(image)
            if not worst(together, alone) <= tolerance(noise.most, dtype):
                return False
            if not self.gap <= 2 * float((together - alone).abs().max()):
                return False
        return True


def differing(alone: Sequence[CutTrace], together: Sequence[CutTrace], images: int) -> Differing | None:
    """Where a prompt's cuts first differ from what they do in a batch; None if they keep the same."""
    mine, others = kept_by(alone, images), kept_by(together, images)
    first = next((cut for cut, (a, b) in enumerate(zip(mine, others, strict=True)) if a != b), None)
    if first is None:
        return None
    pairs = list(zip(chain(*mine), chain(*others), strict=True))
    moved = sum(max(len({*a} - {*b}), len({*b} - {*a})) for a, b in pairs)
    return Differing(alone[first], together[first], moved, sum(len(a) for a, _ in pairs))


def kept_by(cuts: Sequence[CutTrace], images: int) -> list[list[list[int]]]:
    """The tokens of every image that every cut keeps."""
    return [[cut.tokens(image) for image in range(images)] for cut in cuts]
