"""What methods share that cut in several steps inside the decoder, by a published schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from vlmprune.methods.base import Pruner
from vlmprune.parts import ModelFacts, Schedule, ascending, decoder_cuts, falling

__all__ = ["DEPTH", "Staged"]

DEPTH = 32  # of the decoder that a user's layer numbers mean


@dataclass(frozen=True)
class Staged(Pruner):
    """A method that cuts at several decoder layers.

    Args:
        keep: visual tokens per image left after the last cut, or a fraction; without a budget the published schedule
            runs, another value stretches what it removes so that it ends there.
        average: the mean over all layers, met in the same way.
        prune_layers: 1-based, of a 32-layer decoder; at another depth they scale by max(previous + 1, round(p L / 32)).
        keep_ratios: of the tokens that entered the LLM, one per cut, floored, but never fewer than 1 of an image that
            has tokens.
    """

    optional = True

    prune_layers: Annotated[tuple[int, ...], ascending(DEPTH - 1)] = (8, 16, 24)
    keep_ratios: Annotated[tuple[float, ...], falling()] = (0.5, 0.25, 0.125)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.keep_ratios) != len(self.prune_layers):
            raise ValueError(
                f"keep_ratios has {len(self.keep_ratios)} entries, prune_layers {len(self.prune_layers)}: one per cut."
            )
        if self.keep_ratios[-1] == 1 and (self.keep, self.average) != (None, None):
            raise ValueError(
                f"keep_ratios={self.keep_ratios} remove nothing that keep= or average= could stretch: lower the last."
            )

    def stages(self, facts: ModelFacts) -> tuple[list[int], Schedule]:
        """The decoder layers to cut at, and how many tokens stay behind each cut.

        Raises:
            ValueError: too few layers, or an `average` that cannot be met.
        """
        layers = decoder_cuts("prune_layers", self.prune_layers, facts.decoder_layers)
        return layers, Schedule.at(layers, facts.decoder_layers, self.keep_ratios, self.keep, self.average)
