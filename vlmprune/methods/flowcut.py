"""FlowCut (arXiv 2505.19536; code TungChintao/FlowCut): patches that little flows from leave the tower as it runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from torch.nn.functional import pad

from vlmprune.methods.base import AnyCut, Cut, Decoder, InTower, Layout, ModelFacts, Reduction, Seen, register
from vlmprune.parts import (
    BlockFlow,
    Carried,
    Kept,
    Stay,
    TextFlow,
    TowerCut,
    UnsupportedError,
    Vision,
    count,
    layer_of,
    schedule_layers,
    top_k,
)

__all__ = ["FlowCut", "importance", "to_remove"]

MORE = 2.5  # times the budget that leaves the tower where a second cut comes


def importance(flow: torch.Tensor) -> torch.Tensor:
    """`(views, patches)` of `BlockFlow` `(views, patches, 3)`: (share of attention + share of alikeness) * length."""
    paid, alike, length = flow.unbind(-1)
    return (paid / paid.sum(1, keepdim=True) + alike / alike.sum(1, keepdim=True)) * length


def to_remove(paid: torch.Tensor, left: torch.Tensor, target: int, ahead: int, together: bool = False) -> torch.Tensor:
    """`(views,)` long, how many patches go: the fewer the more evenly attention is spread, and the more layers follow.

    Args:
        paid: `(views, patches)` attention, 0 where there is none.
        left: `(views,)` long, patches that are left; target: of them at the end.
        ahead: layers from this one to the last that may cut, itself not counted; at 0 all go that are too many.
        together: the most even view decides for all.
    """
    if ahead == 0:
        return left - target
    even = torch.special.entr(paid / paid.sum(1, keepdim=True)).sum(1) / left.clamp(min=2).log()
    even = even.amax() if together else even
    return ((left - target) / ahead**0.5 * (1 - even.square()).clamp(0, 1)).round().long()


@register("flowcut")
@dataclass(frozen=True)
class FlowCut(InTower):
    """Drop patches in every second tower layer by what flows between them and [CLS], judged over all layers so far.

    A layer's score is `importance`; c = c / 2 + score / 2 from layer to layer. How many go is `to_remove`, and the last
    cut, in front of the layer whose output becomes the features, leaves the budget.

    Where an image has views, two and a half times the budget leaves the tower (code: of each of five tiles half of the
    image's budget), and a second cut in the decoder keeps it, by the `importance` of what flows to the prompt's end.

    Args:
        keep: patches per image (a fraction on families with views) that are left after the last cut.
        average: the same as a mean over decoder layers.
        layer: 0-based decoder layer of 32 (scaled) of the second cut (code: 1); None leaves it out.
        parity: None lets every view decide how many go. "released": the most even view of a call decides for all, so
            that what is kept of an image hangs on the others.
    """

    summary = "patches from which much flows to the [CLS] token, layer by layer; the others leave the tower early"
    paper = "arXiv 2505.19536"
    needs = "attention and values of every tower layer"
    looks_at = "tower"
    stage = "vision tower, then before the LLM; with crops again at decoder layer 1 of 32"
    syncs = 1
    refuses_inputs: ClassVar[dict[str, str]] = {
        "shrunk": "drops patches inside the tower, and here packing blends several of them in a token"
    }

    parity: Literal["released"] | None = None
    layer: Annotated[int | None, layer_of(32, 1, 31)] = 1

    def cuts(self, facts: ModelFacts) -> list[AnyCut]:
        target, last = self.left(facts), facts.feature_layer - 1
        if last < 0:
            raise UnsupportedError("flowcut cuts in front of the layer that makes the features, here the first one.")
        if target == facts.view_patches:
            return []
        again: list[AnyCut] = []
        if facts.views and self.layer is not None:
            (late,) = schedule_layers((self.layer,), facts.decoder_layers)
            enters, left = self.shares(late / facts.decoder_layers)
            again = [Cut(Decoder(late), (TextFlow(late),), partial(self.again, left=left), self.positions)]
            target = count(enters, facts.view_patches) + 1
        if target >= facts.view_patches:
            return again
        cuts: list[AnyCut] = []
        for layer in range(last + 1):
            see = (BlockFlow(layer), *([Carried()] if layer else []))
            told = {"target": target, "ahead": last - layer, "first": int(facts.has_cls)}
            cuts.append(TowerCut(Vision(layer + 1), see, partial(self.flow, **told)))
        return [*cuts, Cut(Decoder(0), (Kept(),), partial(self.drop, target=target), self.positions), *again]

    def shares(self, early: float) -> tuple[float, float]:
        """Of all patches, those that leave the tower and those that are left behind a second cut.

        Args:
            early: share of the decoder's layers in front of it.
        """
        left = self.keep or self.average / (1 + (MORE - 1) * early)
        if self.keep is None and left * MORE > 1:  # the tower leaves all
            left = (self.average - early) / (1 - early)
        return min(1.0, MORE * left), left

    def flow(self, seen: Seen, sizes: torch.Tensor, target: int, ahead: int, first: int) -> Stay:
        """Pure: what flows in a layer and the scores so far in, who stays out; `first` patches stand behind [CLS]."""
        flow, *before = (value[:, first:] for value in seen.values())
        score = importance(flow) if not before else (before[0] + importance(flow)) / 2
        scores = pad(score, (first, 0))
        if ahead % 2:
            return Stay(None, scores=scores)
        there = sizes[:, first:] > 0
        left = there.sum(1)
        keep = top_k(score, left - to_remove(flow[..., 0], left, target, ahead, self.parity == "released"), there)
        return Stay(pad(keep, (first, 0), value=True), None if ahead else target + first, scores)

    def drop(self, seen: Seen, layout: Layout, target: int) -> Reduction:
        """Pure: keep what is left of the tower's tokens."""
        return self.stays(seen[Kept()], layout, target)

    def again(self, seen: Seen, layout: Layout, left: float) -> Reduction:
        """Pure: what flows to the prompt's end in, what stays out."""
        (flow,) = seen.values()
        return self.best(importance(flow), layout, [count(left, grid.patches) for grid in layout.grids])
