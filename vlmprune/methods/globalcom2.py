"""GlobalCom² (arXiv 2501.05179; code xuyang-liu16/GlobalCom2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch.nn.functional import interpolate, normalize, one_hot
from torch.nn.utils.rnn import pad_sequence

from vlmprune.methods.base import BeforeLLM, Layout, Merge, ModelFacts, Reduction, Seen, Tap, UnsupportedError, register
from vlmprune.parts import (
    HAIR,
    ClsLogits,
    Distinctness,
    ImageGrid,
    Positive,
    Range,
    need_cls,
    need_crops,
    top_k,
    upload,
)

__all__ = ["Commanded", "GlobalCom2", "crop_ratios"]


def crop_ratios(thumbnail: torch.Tensor, crops: tuple[int, int], ratio: float, tau: float) -> torch.Tensor:
    """How much of every crop to keep, `(..., crops)` float64: the thumbnail is the commander.

    The thumbnail is divided into one cell per crop (remainders go to the last row and column); the sums of its scores
    over the cells, as softmax(sum / tau), move each crop's ratio up or down around `ratio`, clipped at 1.

    Args:
        thumbnail: `(..., rows, cols)` scores.
        crops: (vertical, horizontal) number of crops.
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


def stretch(scores: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Resize a `(rows, cols)` map of scores bilinearly, half-pixel centres, no antialias."""
    return interpolate(scores[None, None], shape, mode="bilinear", align_corners=False)[0, 0]


@dataclass(frozen=True)
class Commanded(BeforeLLM):
    """What both ways of counting share: the thumbnail says how much of every crop stays, and helps to say what."""

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

    tau: Annotated[Positive, Range(1, 40, log=True)] = 10.0
    score: Literal["cls", "distinct"] = "cls"

    def see(self, facts: ModelFacts) -> tuple[Tap, ...]:
        need_crops(self.known_as, facts, "shares a budget")
        if self.score == "distinct":
            return (Distinctness(facts.feature_layer + 1),)
        need_cls(self.known_as, facts, "use score='distinct'")
        return (ClsLogits(facts.tower_layers - 1),)

    @property
    def share(self) -> int | float:
        """The budget, or the code's default."""
        return 0.25 if self.budget is None else self.budget

    def ratio(self, grid: ImageGrid) -> float:
        """R of the paper for one image."""
        return self.share if isinstance(self.share, float) else min(1.0, self.share / grid.patches)

    def shares(self, scores: torch.Tensor, grid: ImageGrid) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What every view of an image of `(tokens,)` scores gets.

        Returns:
            `(views, tokens)` scores by which a view's tokens are chosen, `(views, tokens)` bool which these are, and
            `(views,)` float64 how many of them stay, fractions of a token among them.
        """
        ratio, thumb, device = self.ratio(grid), grid.side[0] * grid.side[1], scores.device
        patch, view = ~upload(grid.newline, device), upload(grid.view, device)
        own = (view == 0) & patch
        quota = scores.new_full((1,), thumb * ratio, dtype=torch.float64)
        if len(grid.planes) == 1:  # a picture so thin that un-padding leaves no patch of its canvas
            return scores[None], own[None], quota.clamp(min=1)
        rows, cols = grid.planes[1]
        small = scores[:thumb].view(grid.side)
        guide = stretch(small, (rows, cols))
        guide = guide[upload(grid.row, device).clamp(max=rows - 1), upload(grid.col, device).clamp(max=cols - 1)]
        member = (view == torch.arange(1, grid.views, device=device)[:, None]) & patch
        # a crop's own scores and the guide, each of length 1 over the crop's tokens
        local = sum(normalize(torch.where(member, x, 0), dim=-1, eps=1e-12) for x in (scores, guide))
        crops = upload(grid.patches_per_view[1:], device) * crop_ratios(small, grid.crops, ratio, self.tau)
        return torch.cat((scores[None], local)), torch.cat((own[None], member)), torch.cat((quota, crops))


@register("globalcom2")
@dataclass(frozen=True)
class GlobalCom2(Commanded):
    """Let the thumbnail decide how much of every crop stays, and help to decide what.

    Scores are the last tower layer's [CLS] logits (before the softmax: with probabilities the budgets would be flat).
    The thumbnail keeps its own best floor(N * R) patches; crop j keeps floor(n_j * r_j) of its un-padded patches by its
    own scores plus the thumbnail's, stretched over the un-padded canvas, or the shrunken one of LLaVA-OneVision (the
    source's code for it is not public).

    Args:
        keep, average: R, a fraction (0.25, the code's default, if none is given), or patches per image. Budgets are
            floored per view and clipped at whole crops: tables show the real count, which may be none (source).
        tau: temperature of the crop budgets (code: 10).
        score: "cls", or "distinct": negated cosine to the view's mean patch, the appendix's score for towers without a
            [CLS] token (its features and details are inferred).
        parity: None puts every token back in its place, in ascending order. "released": thumbnail by descending score,
            crop tokens at the place of their number among the un-padded ones, one newline after every canvas row; more
            tokens than there were are an error, no other method may cut, and R = 1 leaves the image as it is.
    """

    summary = "the thumbnail sets each crop's budget and guides its choice"
    syncs = 1

    parity: Literal["released"] | None = None

    @property
    def reorders(self) -> bool:
        return self.parity == "released"

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: `(images, tokens)` scores in, decision out."""
        if self.parity and any(grid.blend is not None for grid in layout.grids):
            raise UnsupportedError("parity='released' repeats code that knows no shrunken canvas: leave parity away.")
        (scores,) = seen.values()
        keep, combined = torch.zeros_like(layout.alive), scores.clone()
        for i, grid in enumerate(layout.grids):  # images differ in their grids; tokens do not meet a loop
            keep[i, : grid.tokens], combined[i, : grid.tokens] = self.choose(scores[i, : grid.tokens], grid)
        keep &= layout.alive
        if self.parity:
            return self.released(keep, combined, layout)
        return self.kept(keep, layout, None, combined)

    def choose(self, scores: torch.Tensor, grid: ImageGrid) -> tuple[torch.Tensor, torch.Tensor]:
        """`(tokens,)` kept patches of one image, and the scores they were chosen by."""
        if self.ratio(grid) >= 1:
            return ~upload(grid.newline, scores.device), scores
        local, member, quota = self.shares(scores, grid)
        kept = top_k(local, (quota + HAIR).floor().long(), member).any(0)
        return kept, torch.where(upload(grid.view, scores.device) == 0, scores, local[1:].sum(0))

    def released(self, keep: torch.Tensor, scores: torch.Tensor, layout: Layout) -> Reduction:
        """The sequence of the released code: a new order, written over the image's first tokens."""
        orders = [
            torch.arange(grid.tokens, device=keep.device)
            if self.ratio(grid) >= 1
            else released_order(mine[: grid.tokens], score[: grid.tokens], grid)
            for mine, score, grid in zip(keep, scores, layout.grids, strict=True)
        ]
        counts = [len(order) for order in orders]
        for i, (grid, count) in enumerate(zip(layout.grids, counts, strict=True)):
            if count > grid.tokens:
                made = f"{count} tokens of image {i}, which has {grid.tokens}"
                raise ValueError(f"parity='released' makes {made}: lower keep.")
        source = pad_sequence(orders, batch_first=True)
        number, most = torch.arange(layout.width, device=keep.device), upload(counts, keep.device)[:, None]
        into = number[: source.shape[1]].expand_as(source)
        merge = Merge(into, (into < most).float(), source)
        return Reduction(number < most, counts, merge=merge, scores=scores)


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
    member = one_hot(view, grid.views) * ~newline[:, None]
    place = (member.cumsum(0) - member)[token, view[token]]
    y, x = (crop // across) * rows + place // cols, (crop % across) * cols + place % cols
    width = across * cols + 1
    ends = torch.arange(1, down * rows + 1, device=device) * width - 1
    slot = torch.cat((y * width + x, ends))
    newlines = newline.nonzero().flatten()[:1].expand(down * rows)
    return torch.cat((thumbnail, torch.cat((token, newlines))[slot.argsort()]))
