"""What a forward pass really did."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

from vlmprune.parts.cuts import Merge, Positions
from vlmprune.parts.layout import ImageGrid

__all__ = ["CutTrace", "Trace"]


@dataclass(frozen=True)
class CutTrace:
    """One cut of one prefill.

    Attributes:
        layer: decoder layer at whose input tokens went.
        method: registered name of the method that cut.
        positions: position policy of the cut.
        keep: `(images, tokens)` bool, tokens alive after the cut (newlines included), on the model's device.
        merge: how dropped tokens flowed into kept ones, or None.
        scores: `(images, tokens)` float scores behind the choice, or None.
        soft: `(images, tokens)` float, in training with soft masks: the weight of every token so far, with gradients
            (nothing was removed, and `keep` is what would be left).
    """

    layer: int
    method: str
    positions: Positions
    keep: torch.Tensor = field(repr=False)
    merge: Merge | None = field(default=None, repr=False)
    scores: torch.Tensor | None = field(default=None, repr=False)
    soft: torch.Tensor | None = field(default=None, repr=False)

    def tokens(self, image: int) -> list[int]:
        """Token numbers of `image` alive after this cut: ascending, or, where the cut has an order of its own, in that
        order, tokens that stand there repeatedly included."""
        if self.merge is not None and self.merge.source is not None:
            return self.merge.source[image][self.merge.weight[image] > 0].tolist()
        return self.keep[image].nonzero().flatten().tolist()

    @property
    def merged(self) -> bool:
        """Whether dropped tokens flowed into kept ones."""
        return self.merge is not None


@dataclass(frozen=True)
class Trace:
    """What the last pruned prefill did; device tensors are read when asked for, never during the pass.

    In a later turn of a conversation every figure is about what that turn's call brought, and none about what the cache
    held before. Guesses that come with a prompt (of an assistant, of a prompt lookup) count as prompt.

    Attributes:
        grids: layout of every image, in prompt order (expanded beams included).
        sample: batch row of every image.
        cuts: what every cut did, in order.
        prompt_length: columns of the unpruned prompt batch.
        kv_lengths: columns each decoder layer cached for the prompt (its longest row), by layer.
        row_lengths: for every decoder layer, the real tokens of every batch row.
        prompt_lengths: real tokens of every batch row before any cut.
    """

    grids: list[ImageGrid] = field(repr=False)
    sample: list[int]
    cuts: list[CutTrace]
    prompt_length: int
    prompt_lengths: list[int]
    kv_lengths: list[int]
    row_lengths: list[list[int]] = field(repr=False, default_factory=list)

    def kept(self, image: int = 0, cut: int = -1) -> list[int]:
        """Token numbers of `image` alive after `cut` (see `CutTrace.tokens`); newlines counted and included."""
        if not self.cuts:  # nothing in the language model was cut
            return list(range(self.grids[image].tokens))
        return self.cuts[cut].tokens(image)

    def kept_patches(self, image: int = 0, cut: int = -1) -> list[int]:
        """As `kept`, without newlines (token numbers still count them)."""
        newline = self.grids[image].newline
        return [t for t in self.kept(image, cut) if not newline[t]]

    @cached_property
    def counts(self) -> list[dict[str, int]]:
        """Per image: patches and newlines before and after all cuts."""
        return [
            {
                "patches_before": grid.patches,
                "patches_after": len(self.kept_patches(i)),
                "newlines_before": grid.newlines,
                "newlines_after": len(self.kept(i)) - len(self.kept_patches(i)),
            }
            for i, grid in enumerate(self.grids)
        ]

    def entering(self, image: int = 0) -> int:
        """Visual tokens of `image` (newlines included) that enter the language model's first layer."""
        return self._alive(image, 0)

    def layer_average(self, image: int = 0) -> float:
        """Visual tokens of `image` (newlines included), averaged over all decoder layers."""
        layers = len(self.kv_lengths)
        return sum(self._alive(image, layer) for layer in range(layers)) / layers

    def _alive(self, image: int, layer: int) -> int:
        done = [c for c, cut in enumerate(self.cuts) if cut.layer <= layer]
        return len(self.kept(image, done[-1])) if done else self.grids[image].tokens
