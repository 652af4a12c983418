"""Features that a host adds to its hidden states behind its first layers (DeepStack), where tokens are gone by then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from vlmprune.engine.sequence import by_columns
from vlmprune.errors import UnsupportedError

__all__ = ["Injected"]


@dataclass(frozen=True)
class Injected:
    """What is added behind the layers 0, 1, ... of a language model.

    Attributes:
        features: `(batch, prompt, dim)` by layer, 0 in columns of text.
    """

    features: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, visual: torch.Tensor, features: list[torch.Tensor], layers: int) -> Injected:
        """From what the host hands its language model.

        Args:
            visual: `(batch, prompt)` bool, the columns of visual tokens.
            features: `(visual tokens, dim)` by layer.
            layers: of the language model.

        Raises:
            UnsupportedError: something is added behind the last layer, where no later one could be handed it.
        """
        if len(features) >= layers:
            raise UnsupportedError(
                f"this model adds visual features behind each of its {layers} layers, and a pruned call can add them "
                "in front of a layer alone: it cannot be pruned."
            )
        # a boolean index would wait for the device
        number = (visual.flatten().long().cumsum(0) - 1).clamp(min=0).view_as(visual)
        here = visual[..., None]
        return cls(tuple(torch.where(here, x[number.to(x.device)], 0) for x in features))

    def before(self, index: int, hidden: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """The input `(batch, length, dim)` of layer `index` with what belongs behind the layer before it.

        Args:
            columns: `(batch, length)` prompt column of every entry.
        """
        if not 0 < index <= len(self.features):
            return hidden
        return hidden + by_columns(self.features[index - 1].to(hidden), columns)

    def merged(self, index: int, columns: torch.Tensor, merge: Callable[[torch.Tensor], torch.Tensor]) -> Injected:
        """With what is still to come at a cut of layer `index` merged as the hidden states are."""
        made = []
        for number, features in enumerate(self.features):
            if number >= index:
                here = columns[..., None].expand(-1, -1, features.shape[-1])
                features = features.scatter(1, here, merge(features.gather(1, here)))
            made.append(features)
        return replace(self, features=tuple(made))
