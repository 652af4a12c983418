"""SparseVLM (arXiv 2410.04417; code Gumpest/SparseVLMs), with its "+" version."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from vlmprune.methods.base import AnyCut, AnyNewlines, Layout, Merge, ModelFacts, Pruner, Reduction, Seen, register
from vlmprune.parts import (
    Hidden,
    Layers,
    Rated,
    Raters,
    Schedule,
    UnsupportedError,
    candidates,
    capped,
    decoder_cuts,
    floored,
    nearest,
    peaks,
    top_k,
)

__all__ = ["SparseVLM", "recycled"]

# tokens of 576 behind the three cuts, for the averages of 192, 128, 96 and 64 that they are called by
RELEASED = ((300, 200, 110), (303, 110, 36), (238, 48, 26), (66, 30, 17))
PLUS = ((300, 200, 118), (238, 108, 60), (246, 54, 28), (66, 34, 20))


def recycled(removed: int) -> tuple[int, int]:
    """Of so many removed tokens, how many are recycled, and into how many: 30 % of them, and 10 % of those (code)."""
    top = min(removed, floored(removed * 0.3) + 1)
    return top, min(top, floored(top * 0.1) + 1)


def split(left: int, total: int) -> int:
    """Tokens that a cut keeps by their score so that with the recycled ones `left` of `total` stay."""
    kept = max(0, left - recycled(total - left)[1]) if left < total else total
    while 0 < kept < total and kept + recycled(total - kept)[1] > left:
        kept -= 1
    return kept


@register("sparsevlm")
@dataclass(frozen=True)
class SparseVLM(Pruner):
    """Keep what the words of the question that the picture speaks to look at, in three steps, and recycle the rest.

    Raters are the tokens of the text behind the last image that visual tokens point at more than at the mean one (dot
    products of the embeddings). After layers 3, 7 and 16 of 32 (scaled) the tokens stay that raters attend to most in
    that layer. Of the others the best 30 % are clustered around density peaks (`peaks`), and the mean of each cluster
    stays, at the place of its centre (the code appends it).

    Args:
        keep: left after the last cut, recycled tokens included; without a budget the schedule released for 192 tokens.
            Another value takes the released schedule (for 192, 128, 96 or 64) that ends nearest and stretches what it
            removes. `average` is the mean over all layers (released: 206, 145, 114, 82), met in the same way.
        version: "v1" (the paper), or "+" (the code's second version): nothing is recycled, only the 14 of 32 heads that
            look at the picture most count, and their attention is divided by what the rotary embedding alone would
            give (as means over the raters: inferred).
        prune_layers: 1-based, of a 32-layer decoder; another depth scales them.
        positions: None is contiguous for v1 (where positions count) and original for "+", as the code.
        newlines: kept; the code knows single views.
    """

    summary = "what the question's telling words look at, in three steps; the rest is recycled"
    paper = "arXiv 2410.04417"
    looks_at = "decoder"
    needs = "embeddings, decoder attention (three layers)"
    stage = "decoder layers 3, 7, 16 of 32"
    optional = True

    version: Literal["v1", "+"] = "v1"
    prune_layers: Layers = (3, 7, 16)
    newlines: AnyNewlines = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.prune_layers) != 3:
            raise ValueError(f"prune_layers={self.prune_layers}: the schedule has three cuts.")

    def schedule(self, layers: list[int], depth: int, total: int) -> Schedule:
        """The released schedule nearest to the budget of an image's `total`, stretched to it."""
        made = [
            Schedule.at(layers, depth, tuple(n / 576 for n in self.counts(kept)), None, None)
            for kept in (RELEASED if self.version == "v1" else PLUS)
        ]
        chosen = made[nearest(made, self.keep, self.average, max(total, 1))]
        return replace(chosen, keep=self.keep, average=self.average)

    def counts(self, kept: tuple[int, ...]) -> list[int]:
        """Tokens behind every cut, recycled ones included, of those it keeps of 576 by their score."""
        if self.version == "+":
            return list(kept)
        counts = [576]
        for n in kept:
            counts.append(n + recycled(counts[-1] - n)[1])
        return counts[1:]

    def cuts(self, facts: ModelFacts) -> list[AnyCut]:
        depth = facts.decoder_layers
        layers = decoder_cuts("prune_layers", self.prune_layers, depth)
        if isinstance(self.average, float):
            self.schedule(layers, depth, 10**9).left(10**9, 0)  # a fraction can be met for all images or for none
        see = lambda layer: (Raters(), Rated(layer - 1, self.version == "+"), Hidden())  # noqa: E731
        reduce = partial(self.reduce, schedule=partial(self.schedule, layers, depth))
        return self.in_stages(layers, see, reduce, self.positions or (None if self.version == "v1" else "original"))

    def reduce(self, seen: Seen, layout: Layout, stage: int, schedule: partial) -> Reduction:
        """Pure: `(images, tokens)` ratings and `(images, tokens, dim)` states in, decision out."""
        _, scores, hidden = seen.values()
        among, totals, available = candidates(layout, self.newlines)
        if available is None:
            raise UnsupportedError(
                "sparsevlm must know how many patches an earlier cut left: have newlines='all' there."
            )
        left = capped([schedule(total).left(total, stage) for total in totals], available)
        if self.version == "+":
            return self.kept(top_k(scores, left, among), layout, left, scores)
        number = [split(n, total) for n, total in zip(left, available, strict=True)]
        kept = top_k(scores, number, among)
        top = [recycled(a - n)[0] for a, n in zip(available, number, strict=True)]
        pool = top_k(scores, top, among & ~kept)
        centres, into = peaks(hidden, pool, [n - k for n, k in zip(left, number, strict=True)], max(top))
        size = torch.zeros_like(scores).scatter_add(1, into, pool.to(scores))
        weight = torch.where(pool, 1 / size.gather(1, into).clamp(min=1), (layout.alive & (kept | ~among)).to(scores))
        return self.kept(kept | centres, layout, left, scores, Merge(into, weight))
