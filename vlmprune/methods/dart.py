"""DART (arXiv 2502.11494; code ZichenWen1/DART)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from vlmprune.methods.base import AnyNewlines, Cut, Decoder, Layout, ModelFacts, Positions, Pruner, Reduction, register
from vlmprune.parts import PIVOTS, BesidePivots, KeyLengths, Schedule, Seen, check_layer, take_rows, top_k, upload

__all__ = ["Dart", "farthest_from_pivots"]


def farthest_from_pivots(
    unit: torch.Tensor, text: torch.Tensor, lengths: torch.Tensor, among: torch.Tensor, counts: list[int]
) -> torch.Tensor:
    """The tokens with the longest keys as pivots, and for each pivot the tokens least like it that nobody took.

    Args:
        unit: `(images, tokens, dim)` unit vectors; text: `(images, PIVOTS, dim)`, those of the text's pivots.
        lengths: `(images, tokens)` of the keys; among: `(images, tokens)` bool.
        counts: tokens to keep per image, pivots included.

    Returns:
        `(images, tokens)` bool; the pivots take turns in their order, the image's first, and divide the rest evenly.
    """
    number = [min(PIVOTS, count) for count in counts]
    kept = top_k(lengths, number, among)
    first = lengths.masked_fill(~among, -1).sort(dim=1, descending=True, stable=True).indices[:, :PIVOTS]
    pivots = torch.cat((take_rows(unit, first), text), 1)
    turns = pivots.shape[1]
    for turn in range(turns):
        take = [(c - n) // turns + (turn < (c - n) % turns) for c, n in zip(counts, number, strict=True)]
        like = (unit * pivots[:, turn : turn + 1]).sum(-1)
        kept = kept | top_k(-like, take, among & ~kept)
    return kept


@register("dart")
@dataclass(frozen=True)
class Dart(Pruner):
    """Keep a few pivots with long keys, and the visual tokens that are least like them.

    Four visual tokens and four tokens of the text behind the last image are pivots: those whose keys in layer K - 1 are
    longest (L1). Each in turn keeps the visual tokens whose states (at the input of layer K, behind the model's last
    norm) have the lowest cosine to its own, among those that nobody keeps yet.

    Args:
        keep: left from layer K on; 2/9, the code's 128 of 576, without a budget. `average` is over all layers.
        layer: K, 0-based (code: 2). Not scaled with depth.
        parity: "released" keeps 4 + 8 (keep // 8) tokens, as the released code; None keeps `keep`.
        positions: original (code).
        newlines: kept; how the code counts them on anyres images is not settled.
    """

    summary = "a few tokens with long keys, and those least like them"
    paper = "arXiv 2502.11494"
    looks_at = "decoder"
    needs = "decoder keys and states (one layer)"
    stage = "decoder layer K"
    optional = True

    layer: int = 2
    parity: Literal["released"] | None = None
    positions: Positions = "original"
    newlines: AnyNewlines = "all"

    def cuts(self, facts: ModelFacts) -> list[Cut]:
        layer = check_layer("layer", self.layer, facts.decoder_layers, lowest=1)
        schedule = Schedule.at([layer], facts.decoder_layers, (2 / 9,), self.keep, self.average)
        see = (KeyLengths(layer - 1), BesidePivots(layer))
        return [Cut(Decoder(layer), see, partial(self.reduce, schedule=schedule), self.positions)]

    def left(self, total: int, schedule: Schedule) -> int:
        """Tokens of an image's `total` that stay from layer K on."""
        left = schedule.left(total, 0)
        return left if self.parity is None else min(total, PIVOTS + 2 * PIVOTS * (left // (2 * PIVOTS)))

    def reduce(self, seen: Seen, layout: Layout, schedule: Schedule) -> Reduction:
        """Pure: lengths of keys and unit vectors in, decision out."""
        lengths, unit = seen.values()
        lengths = lengths[upload(layout.sample, lengths.device)].gather(1, layout.position)
        among, counts, reached = self.contest(layout, partial(self.left, schedule=schedule))
        visual, text = unit[:, : layout.width], unit[:, layout.width :]
        kept = farthest_from_pivots(visual, text, lengths, among, reached or counts)
        return self.kept(kept, layout, reached)
