"""GlobalCom² (arXiv 2501.05179; code xuyang-liu16/GlobalCom2)."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from torch.nn import functional

from vlmprune.methods.base import Pruner, register
from vlmprune.parts import (
    HAIR,
    ClsLogits,
    Cut,
    Decoder,
    Distinctness,
    ImageGrid,
    Layout,
    Merge,
    ModelFacts,
    Must,
    Range,
    Reduction,
    Seen,
    Tap,
    UnsupportedError,
    is_number,
    keep_patches,
    need_cls,
    select,
    top_k,
    upload,
)

__all__ = ["GlobalCom2", "GlobalCom2Fixed", "crop_ratios", "guided"]

F64 = torch.float64

POSITIVE = Must("a number above 0", lambda tau: is_number(tau, 0, sys.float_info.max) and tau > 0)


def crop_ratios(thumbnail: torch.Tensor, crops: tuple[int, int], ratio: float, tau: float) -> torch.Tensor:
    """How much of every crop to keep: the thumbnail is the commander.

    The thumbnail is divided into one cell per crop (remainders go to the last row and column); the sums of its scores
    over the cells, as softmax(sum / tau), move each crop's ratio up or down around `ratio`, clipped at 1.

    Args:
        thumbnail: `(..., rows, cols)` scores.
        crops: (vertical, horizontal) number of crops.

    Returns:
        `(..., crops)` float64.
    """
    down, across = crops
    rows, cols = thumbnail.shape[-2:]
    r = (torch.arange(rows) // max(rows // down, 1)).clamp(max=down - 1)
    c = (torch.arange(cols) // max(cols // across, 1)).clamp(max=across - 1)
    cell = upload((r[:, None] * across + c).flatten(), thumbnail.device)
    scores = thumbnail.double().flatten(-2)
    mass = scores.new_zeros(*scores.shape[:-1], down * across).index_add(-1, cell, scores)
    weight = ((mass - mass.amax(-1, keepdim=True)) / tau).exp()
    share = weight / (weight.sum(-1, keepdim=True) + 1e-8)
    return (ratio * (1 + share - share.mean(-1, keepdim=True))).clamp(max=1)


def guided(local: torch.Tensor, guide: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
    """A crop's own scores and the thumbnail's guide, each L2-normalised over the crop's tokens, added.

    Args:
        local, guide: `(crops, tokens)`.
        member: `(crops, tokens)` bool, the tokens of each crop.
    """
    return sum(functional.normalize(torch.where(member, x, 0), dim=-1, eps=1e-12) for x in (local, guide))


def stretch(scores: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Resize a `(rows, cols)` map of scores bilinearly, half-pixel centres, no antialias."""
    return functional.interpolate(scores[None, None], shape, mode="bilinear", align_corners=False)[0, 0]


@dataclass(frozen=True)
class Commanded(Pruner):
    """What both ways of counting share: the thumbnail says how much of every crop stays, and helps to say what.

    Scores are the last tower layer's [CLS] logits (before the softmax: with probabilities the budgets would be flat).
    The thumbnail's share is N * R of its own patches; crop j's is n_j * r_j of its un-padded patches, by its own scores
    plus the thumbnail's, stretched over the un-padded canvas.
    """

    paper = "arXiv 2501.05179"
    needs = "a family with views; tower [CLS] logits (or score='distinct')"
    looks_at = "tower"
    optional = True
    refuses_inputs: ClassVar[dict[str, str]] = {
        "video": "lets the thumbnail of an image command its crops, and a video has no thumbnail",
        "single": "lets the thumbnail of an image command its crops, and leaves an image with a single view as it is, "
        "whatever the budget: give pictures that are cut into crops (LLaVA-OneVision cuts one that stands alone in its "
        "prompt), or take another method",
    }

    tau: Annotated[float, POSITIVE, Range(1, 40, log=True)] = 10.0
    score: Literal["cls", "distinct"] = "cls"

    def cuts(self, facts: ModelFacts) -> list[Cut]:
        if not facts.views:
            raise UnsupportedError(
                f"{self.known_as} shares a budget among the crops of an image, and {facts.family} models have a single "
                "view or do not tell how their views lie."
            )
        if self.score == "cls":
            need_cls(self.known_as, facts, "use score='distinct'")
            tap: Tap = ClsLogits(facts.tower_layers - 1)
        else:
            tap = Distinctness(facts.feature_layer + 1)
        return [Cut(Decoder(0), (tap,), self.reduce, self.positions)]

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: `(images, tokens)` scores in, decision out."""
        raise NotImplementedError

    @property
    def share(self) -> int | float:
        """The budget, or the code's default."""
        return 0.25 if self.budget is None else self.budget

    def ratio(self, grid: ImageGrid) -> float:
        """R of the paper for one image."""
        return self.share if isinstance(self.share, float) else min(1.0, self.share / grid.patches)

    def shares(self, scores: torch.Tensor, grid: ImageGrid) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What every view of an image gets.

        Args:
            scores: `(tokens,)`.

        Returns:
            `(views, tokens)` scores by which a view's tokens are chosen, `(views, tokens)` bool which these are, and
            `(views,)` float64 how many of them stay, fractions of a token among them.
        """
        ratio, thumb, device = self.ratio(grid), grid.side[0] * grid.side[1], scores.device
        patch, view = ~upload(grid.newline, device), upload(grid.view, device)
        own = (view == 0) & patch
        if len(grid.planes) == 1:  # a picture so thin that un-padding leaves no patch of its canvas
            return scores[None], own[None], torch.full((1,), max(1.0, thumb * ratio), dtype=F64, device=device)
        rows, cols = grid.planes[1]
        small = scores[:thumb].view(grid.side)
        guide = stretch(small, (rows, cols))
        guide = guide[upload(grid.row, device).clamp(max=rows - 1), upload(grid.col, device).clamp(max=cols - 1)]
        crop = torch.arange(1, grid.views, device=device)[:, None]
        member = (view == crop) & patch
        local = guided(scores.expand_as(member), guide.expand_as(member), member)
        quota = upload(grid.patches_per_view[1:], device) * crop_ratios(small, grid.crops, ratio, self.tau)
        quota = torch.cat((torch.full((1,), thumb * ratio, dtype=F64, device=device), quota))
        return torch.cat((scores[None], local)), torch.cat((own[None], member)), quota


@register("globalcom2")
@dataclass(frozen=True)
class GlobalCom2(Commanded):
    """Let the thumbnail decide how much of every crop stays, and help to decide what.

    Scores are the last tower layer's [CLS] logits (before the softmax: with probabilities the budgets would be flat).
    The thumbnail keeps its own best floor(N * R) patches; crop j keeps floor(n_j * r_j) of its un-padded patches by its
    own scores plus the thumbnail's, stretched over the un-padded canvas. An image with a single view, which the source
    leaves as it is, is refused: no budget would have an effect. Where LLaVA-OneVision shrinks the un-padded canvas (the
    source's code for it is not public), all this happens on the shrunken one, with scores shrunk as the features are.
    Videos, which have no thumbnail, are refused.

    Args:
        keep, average: R, a fraction (0.25, the code's default, if none is given), or patches per image, turned into the
            fraction of the image's patches. Budgets are floored per view and clipped at whole crops, so tables show the
            real count; a very small budget can leave no patch at all (as in the source).
        tau: temperature of the crop budgets (code: 10).
        score: "cls", or "distinct": negated cosine to the view's mean patch, the appendix's score for towers without a
            [CLS] token (its features and details are inferred).
        parity: None puts every token back in its place, in ascending order. "released" repeats the released code:
            thumbnail by descending score, crop tokens at the place of their number among the un-padded ones, and one
            newline after every canvas row, padded rows included, so a budget near all patches can make more tokens than
            there were, which is an error. It cannot be combined with other methods that cut, and at R = 1 it leaves the
            image as it is (the released code still thins dull crops).
        positions: the family's own; contiguous (code).
        newlines: what happens to newline tokens; `parity="released"` has its own rule.
    """

    summary = "the thumbnail sets each crop's budget and guides its choice"
    syncs = 1

    parity: Literal["released"] | None = None

    def cuts(self, facts: ModelFacts) -> list[Cut]:
        return [replace(cut, reorders=self.parity == "released") for cut in super().cuts(facts)]

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: `(images, tokens)` scores in, decision out."""
        if self.parity and any(grid.blend is not None for grid in layout.grids):
            raise UnsupportedError("parity='released' repeats code that knows no shrunken canvas: leave parity away.")
        (scores,) = seen.values()
        keep = torch.zeros_like(layout.alive)
        combined = scores.clone()
        for i, grid in enumerate(layout.grids):  # images differ in their grids; tokens do not meet a loop
            kept, values = self.choose(scores[i, : grid.tokens], grid)
            keep[i, : grid.tokens], combined[i, : grid.tokens] = kept, values
        keep &= layout.alive
        if self.parity == "released":
            return self.released(keep, combined, layout)
        return replace(keep_patches(keep, layout, None, self.newlines), scores=combined)

    def choose(self, scores: torch.Tensor, grid: ImageGrid) -> tuple[torch.Tensor, torch.Tensor]:
        """`(tokens,)` kept patches of one image, and the scores they were chosen by."""
        if self.ratio(grid) >= 1:
            return ~upload(grid.newline, scores.device), scores
        local, member, quota = self.shares(scores, grid)
        kept = top_k(local, (quota + HAIR).floor().long(), member).any(0)
        return kept, torch.where(upload(grid.view, scores.device) == 0, scores, local[1:].sum(0))

    def released(self, keep: torch.Tensor, scores: torch.Tensor, layout: Layout) -> Reduction:
        """The sequence of the released code: a new order, written over the image's first tokens."""
        into, source, weight, counts = [], [], [], []
        most = layout.width + max(grid.side[0] * grid.crops[0] for grid in layout.grids)
        for i, grid in enumerate(layout.grids):
            if self.ratio(grid) >= 1:
                order = torch.arange(grid.tokens, device=keep.device)
            else:
                order = released_order(keep[i, : grid.tokens], scores[i, : grid.tokens], grid)
            if len(order) > grid.tokens:
                made = f"{len(order)} tokens of image {i}, which has {grid.tokens}"
                raise ValueError(f"parity='released' makes {made}: lower keep.")
            pad = most - len(order)
            source.append(functional.pad(order, (0, pad)))
            into.append(functional.pad(torch.arange(len(order), device=order.device), (0, pad)))
            weight.append(functional.pad(torch.ones(len(order), device=order.device), (0, pad)))
            counts.append(len(order))
        anchors = torch.arange(layout.width, device=keep.device) < upload(counts, keep.device)[:, None]
        merge = Merge(torch.stack(into), torch.stack(weight), torch.stack(source))
        return Reduction(anchors, counts, merge=merge, scores=scores)


@register("globalcom2_fixed")
@dataclass(frozen=True)
class GlobalCom2Fixed(Commanded):
    """GlobalCom² with a count that is known beforehand: its choice, topped up to the budget.

    A patch whose place among its view's patches, best first, is p (from 1) lies p - q beyond the share q of its view.
    The source keeps those that lie beyond by nothing, so as many as its floors leave. This keeps as many as the budget
    says, those that lie beyond by least: all of the source's where these are fewer, and then the next best of views
    whose share was floored most. Where un-padding leaves crops of unequal size, shares can add up to more than the
    budget; then some of the source's go, the last of their views. Not in the paper: a server has to know the count
    before it has seen the picture.

    Args:
        keep, average: as of `globalcom2`; exactly so many patches stay of every image.
        tau, score, positions, newlines: as of `globalcom2`.
    """

    summary = "globalcom2 with exactly the budget's number of patches, so that it can be served"

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: `(images, tokens)` scores in, decision out."""
        (scores,) = seen.values()
        inside = torch.zeros_like(scores, dtype=torch.float32)
        for i, grid in enumerate(layout.grids):
            inside[i, : grid.tokens] = -self.beyond(scores[i, : grid.tokens], grid)
        return select(inside, self.share, layout, self.newlines)

    def beyond(self, scores: torch.Tensor, grid: ImageGrid) -> torch.Tensor:
        """`(tokens,)` float64, how far every patch of an image lies beyond its view's share; newlines anything."""
        local, member, quota = self.shares(scores, grid)
        order = local.masked_fill(~member, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        place = order.argsort(dim=-1) + 1
        return torch.where(member, place - quota[:, None], 0).sum(0)


def released_order(keep: torch.Tensor, scores: torch.Tensor, grid: ImageGrid) -> torch.Tensor:
    """Token numbers of one image in the order of the released code, one newline token for every canvas row.

    Args:
        keep, scores: `(tokens,)`.
    """
    device = keep.device
    view, newline = upload(grid.view, device), upload(grid.newline, device)
    (rows, cols), (down, across) = grid.side, grid.crops
    thumbnail = (keep & (view == 0)).nonzero().flatten()
    thumbnail = thumbnail[scores[thumbnail].sort(descending=True, stable=True).indices]
    if len(grid.planes) == 1:  # a picture so thin that un-padding leaves nothing of its canvas
        return thumbnail
    token = (keep & (view > 0) & ~newline).nonzero().flatten()
    crop = view[token] - 1
    # the code's bug: a token's number among its crop's un-padded tokens is taken for its place in the tile
    member = functional.one_hot(view, grid.views) * ~newline[:, None]
    place = (member.cumsum(0) - member)[token, view[token]]
    y, x = (crop // across) * rows + place // cols, (crop % across) * cols + place % cols
    width = across * cols + 1
    ends = torch.arange(1, down * rows + 1, device=device) * width - 1
    slot = torch.cat((y * width + x, ends))
    newlines = newline.nonzero().flatten()[:1].expand(down * rows)
    return torch.cat((thumbnail, torch.cat((token, newlines))[slot.argsort()]))
