"""SparseVLM (arXiv 2410.04417; code Gumpest/SparseVLMs), with its "+" version."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

import torch

from vlmprune.methods.base import (
    AnyNewlines,
    Cut,
    Decoder,
    Layout,
    Merge,
    ModelFacts,
    Positions,
    Pruner,
    Reduction,
    Seen,
    UnsupportedError,
    register,
)
from vlmprune.parts import (
    DEPTH,
    DecoderLayer,
    DecoderTap,
    Hidden,
    Scene,
    Schedule,
    Visible,
    ascending,
    attention_mass,
    candidates,
    capped,
    decoder_cuts,
    decoder_mass,
    floored,
    keep_patches,
    last_rows,
    mean_weight,
    nearest,
    peaks,
    take_rows,
    top_k,
    upcast,
    upload,
)

__all__ = ["SparseVLM", "raters", "recycled", "strongest"]

# tokens of 576 behind the three cuts, for the averages of 192, 128, 96 and 64 that they are called by
RELEASED = ((300, 200, 110), (303, 110, 36), (238, 48, 26), (66, 30, 17))
PLUS = ((300, 200, 118), (238, 108, 60), (246, 54, 28), (66, 34, 20))
HEADS = 14 / 32  # of the heads that "+" listens to


def raters(visual: torch.Tensor, text: torch.Tensor, seen: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
    """`(batch, rows)` bool: the text tokens that visual tokens point at more than at the mean one, all if none is.

    Args:
        visual: `(batch, tokens, dim)`; text: `(batch, rows, dim)`, both at the input of the language model.
        seen: `(batch, tokens)` bool, who is visual; said: `(batch, rows)` bool, who is text.
    """
    points = upcast(visual) @ upcast(text).transpose(-1, -2)
    points = points.masked_fill(~said[:, None], torch.finfo(points.dtype).min).softmax(-1)
    score = (points * seen[..., None]).sum(1) / seen.sum(1, keepdim=True).clamp(min=1)
    above = said & (score > (score * said).sum(1, keepdim=True) / said.sum(1, keepdim=True).clamp(min=1))
    return torch.where(above.any(1, keepdim=True), above, said)


@dataclass(frozen=True)
class Raters(DecoderTap):
    """Weights `(batch, prompt)` that average the rating text tokens, by column of the prompt: all behind an image."""

    layer: int = 0

    def measure(self, layer: DecoderLayer, hidden: torch.Tensor, scene: Scene) -> torch.Tensor:
        left, at = scene.sequence, scene.flat_index()
        rows, weight = last_rows(left.asked(), *scene.text_after)
        visual = torch.zeros(left.columns.numel(), dtype=torch.long, device=hidden.device)
        visual = visual.scatter_add(0, at.flatten(), scene.layout.alive.long().flatten()).view_as(left.columns) > 0
        rates = mean_weight(raters(hidden, take_rows(hidden, rows), visual, weight > 0))
        return rates.new_zeros(len(rates), left.prompt).scatter_add(1, left.columns.gather(1, rows), rates)


@dataclass(frozen=True)
class Rated(DecoderTap):
    """Attention that visual tokens receive in a decoder layer from the rating text tokens, `(images, tokens)` float32.

    With `plus` it is that of the heads which look at the picture most, over what the rotary embedding alone would give.
    """

    attends = True

    plus: bool = False

    def measure(self, layer: DecoderLayer, hidden: torch.Tensor, scene: Scene) -> torch.Tensor:
        left, at = scene.sequence, scene.flat_index()
        rows, inside = last_rows(left.asked(), *scene.text_after)
        weight = scene.seen[Raters()].gather(1, left.columns.gather(1, rows)) * (inside > 0)
        if not self.plus:
            return decoder_mass(layer, hidden, scene, [(rows, weight)])[0].flatten()[at]
        if left.past is not None:
            raise UnsupportedError("sparsevlm's '+' cannot go on behind what a cache holds: start a new prompt.")
        normed, (cos, sin) = layer.normed(hidden), left.rotary
        query = layer.queries(take_rows(normed, rows), take_rows(cos, rows), take_rows(sin, rows))
        key, heads = layer.keys(normed, cos, sin), query.shape[1]
        key = key.repeat_interleave(heads // key.shape[1], 1)
        real, window = left.asked(), layer.window or 0
        alone = [x.repeat_interleave(heads, 0) for x in (rows, real, weight)]
        mass = attention_mass(
            query.flatten(0, 1)[:, None], key.flatten(0, 1)[:, None], layer.scale, Visible(*alone[:2], window), alone[2]
        ).unflatten(0, (-1, heads))
        # a query and a key of ones, turned: what the distance of two tokens alone is worth
        turned = torch.cat((cos, sin), -1)
        near = attention_mass(
            take_rows(turned, rows)[:, None], turned[:, None], layer.scale, Visible(rows, real, window), weight
        )
        # of every image: heads differ in how much they look at it
        sample = upload(scene.layout.sample, at.device)
        place = (at - sample[:, None] * left.length)[:, None].expand(-1, heads, -1)
        seen = mass[sample].gather(2, place)
        # what a sliding window hides is nothing of nothing
        near = near[sample].gather(1, place[:, 0]).clamp(min=torch.finfo(torch.float32).tiny)
        return strongest(seen, scene.layout.alive, heads) / near


def strongest(attention: torch.Tensor, among: torch.Tensor, heads: int) -> torch.Tensor:
    """Mean over the 14 of 32 heads (scaled) with most attention on `among`.

    Args:
        attention: `(images, heads, tokens)`; among: `(images, tokens)` bool.
    """
    mass = (attention * among[:, None]).sum(-1)
    number = max(1, round(HEADS * heads))
    best = top_k(mass, [number] * len(mass), torch.ones_like(mass, dtype=torch.bool))
    return (attention * best[..., None]).sum(1) / number


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
    products of the embeddings). After layers 3, 7 and 16 of 32 the tokens stay that raters attend to most in that
    layer. Of the others the best 30 % are clustered around density peaks (`peaks`), and the mean of each cluster stays,
    at the place of its centre (the code appends it).

    Args:
        keep: visual tokens per image left after the last cut, recycled ones included, or a fraction; without a budget
            the schedule released for 192 tokens. Another value takes the released schedule (for 192, 128, 96 or 64)
            that ends nearest and stretches what it removes.
        average: the mean over all layers, recycled tokens included (released: 206, 145, 114, 82), met in the same way.
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
    prune_layers: Annotated[tuple[int, ...], ascending(DEPTH - 1)] = (3, 7, 16)
    positions: Positions | None = None
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

    def cuts(self, facts: ModelFacts) -> list[Cut]:
        depth = facts.decoder_layers
        layers = decoder_cuts("prune_layers", self.prune_layers, depth)
        if isinstance(self.average, float):
            self.schedule(layers, depth, 10**9).left(10**9, 0)  # a fraction can be met for all images or for none
        positions = self.positions or (None if self.version == "v1" else "original")
        reduce = partial(self.reduce, schedule=partial(self.schedule, layers, depth))
        return [
            Cut(
                Decoder(layer),
                (Raters(), Rated(layer - 1, self.version == "+"), Hidden()),
                partial(reduce, stage=stage),
                positions,
            )
            for stage, layer in enumerate(layers)
        ]

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
            return keep_patches(top_k(scores, left, among), layout, left, self.newlines, scores)
        number = [split(n, total) for n, total in zip(left, available, strict=True)]
        kept = top_k(scores, number, among)
        top = [recycled(a - n)[0] for a, n in zip(available, number, strict=True)]
        pool = top_k(scores, top, among & ~kept)
        centres, into = peaks(hidden, pool, [n - k for n, k in zip(left, number, strict=True)], max(top))
        size = torch.zeros_like(scores).scatter_add(1, into, pool.to(scores))
        weight = torch.where(pool, 1 / size.gather(1, into).clamp(min=1), (layout.alive & (kept | ~among)).to(scores))
        reduction = keep_patches(kept | centres, layout, left, self.newlines, scores)
        return replace(reduction, merge=Merge(into, weight))
