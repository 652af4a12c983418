"""FastV (arXiv 2403.06764; code pkunlp-icler/FastV)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from vlmprune.methods.base import AnyNewlines, Cut, Decoder, Layout, ModelFacts, Positions, Pruner, Reduction, register
from vlmprune.parts import Seen, TextAttention, check_layer, count

__all__ = ["FastV"]


@register("fastv")
@dataclass(frozen=True)
class FastV(Pruner):
    """Keep the visual tokens that the last prompt token attends to in an early decoder layer.

    The attention of layer K - 1 (head mean) decides what enters layer K; system and text tokens always stay. With
    `use_cache=False` every step has another last token and chooses anew, and with assisted or prompt-lookup decoding
    the first call ends in guessed tokens: answers can differ from plain greedy.

    Args:
        keep: left from layer K on; without a budget 0.5, the code's default.
        average: the mean over all layers; layer K onwards gets (L T - K N) / (L - K) tokens.
        layer: K, 0-based (code default 2; the demo uses 3). Not scaled with depth.
        rows: "last", the last prompt token's row (all released code), or "all", the mean over every row (paper).
        positions: original (code: `position_ids` are indexed with what is kept).
        newlines: "candidates" (code: newline tokens compete like patches), or a rule for them.
    """

    summary = "the tokens that the last prompt token attends to in decoder layer K - 1"
    paper = "arXiv 2403.06764"
    needs = "decoder attention (one layer)"
    looks_at = "decoder"
    stage = "decoder layer K"
    optional = True

    layer: int = 2
    rows: Literal["last", "all"] = "last"
    positions: Positions = "original"
    newlines: AnyNewlines = "candidates"

    def cuts(self, facts: ModelFacts) -> list[Cut]:
        layer = check_layer("layer", self.layer, facts.decoder_layers, lowest=1)
        reduce = partial(self.reduce, before=layer / facts.decoder_layers)
        if isinstance(self.average, float):
            self.left(10**9, layer / facts.decoder_layers)  # a fraction can be met for all images or for none
        return [Cut(Decoder(layer), (TextAttention(layer - 1, self.rows),), reduce, self.positions)]

    def reduce(self, seen: Seen, layout: Layout, before: float) -> Reduction:
        """Pure: `(images, tokens)` attention in, decision out; `before` is the share of layers before the cut."""
        (scores,) = seen.values()
        return self.best(scores, layout, partial(self.left, before=before))

    def left(self, total: int, before: float) -> int:
        """Tokens of an image's `total` that stay from layer K on."""
        if self.average is None:
            return count(0.5 if self.keep is None else self.keep, total)
        wanted = self.average if isinstance(self.average, int) else self.average * total
        left = round((min(wanted, total) - before * total) / (1 - before))
        if left < 1:
            raise ValueError(
                f"average={self.average} cannot be met: the layers before the cut see all tokens, which alone is an "
                f"average of {before:.3f} of them."
            )
        return left
