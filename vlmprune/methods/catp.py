"""CATP, for prompts with demonstrations (arXiv 2508.07871; its code is not public)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from torch.nn.functional import cosine_similarity, normalize, pad

from vlmprune.methods.base import Asking, Cut, Decoder, Layout, ModelFacts, Positions, Reduction, Seen, register
from vlmprune.parts import (
    Cover,
    Hidden,
    MeanState,
    OwnText,
    Schedule,
    TextAttention,
    Weight,
    count,
    layer_of,
    queries,
    schedule_layers,
    select_covering,
    top_k,
    upcast,
    upload,
)

__all__ = ["Catp"]


@register("catp")
@dataclass(frozen=True)
class Catp(Asking):
    """Cut pictures that come with examples: half before the LLM, the other half where it compares them to the query.

    The last picture of a prompt is the query's, those in front of it are demonstrations. Before the LLM every picture
    keeps the patches that cover it best (facility location over cosines) and are like its own text. At layer K all
    demonstrations compete for what they keep together, by what the last prompt token's attention to a patch gains
    over the layer before, and by how much the patch is like the mean token of the query. One layer later the query's
    picture keeps what is like the mean of what stands in front of it.

    Args:
        keep: left in the end, of demonstrations as their mean; the first cut makes half of the way, of a picture that
            is alone all. `average` is the same as a mean over decoder layers.
        layer: K, 0-based, of a 32-layer decoder (paper: 6 of 32 and of 28, 10 of 40); another depth scales it.
        alignment: lambda 1, of a patch's likeness to its picture's text, against the sum over all patches covered.
        likeness: lambda 2, of its likeness to the query, against the gain of attention.
        question: as of `Asking`, but None takes all text, the template's too.
        positions: original (inferred; the paper does not say).
    """

    summary = "of several pictures with texts: what covers each, then what the last one calls for (one picture: cover)"
    paper = "arXiv 2508.07871"
    needs = "text, features; of several pictures decoder attention (two layers) and states"
    looks_at = "question"
    stage = "before the LLM; of several pictures also layers 6 and 7 of 32"
    syncs = 2  # how demonstrations share what is left; five more where images and videos are mixed

    layer: Annotated[int, layer_of(32, 1, 30)] = 6
    alignment: Weight = 0.7
    likeness: Weight = 0.6
    positions: Positions = "original"

    def cuts(self, facts: ModelFacts) -> list[Cut]:
        depth = facts.decoder_layers
        (inner,) = schedule_layers((self.layer,), depth)
        if inner + 1 >= depth:
            raise ValueError(f"layer={self.layer} scales to {inner}; catp cuts there and one later, of {depth} layers.")
        # half of what is removed goes at the first cut, whatever the budget stretches it to
        first, last = (Schedule.at([0, at], depth, (0.5, 0), self.keep, self.average) for at in (inner, inner + 1))
        gains = (TextAttention(inner - 1), TextAttention(inner), Hidden(), MeanState(inner))
        context = (Hidden(), MeanState(inner + 1, "context"))
        left = partial(self.left, others=first, query=last)
        return [
            Cut(Decoder(0), (Hidden(), OwnText(0, self.question)), partial(self.cover, left=left), self.positions),
            Cut(Decoder(inner), gains, partial(self.gain, left=left), self.positions),
            Cut(Decoder(inner + 1), context, partial(self.resemble, left=left), self.positions),
        ]

    def left(self, layout: Layout, last: dict[int, int], stage: int, others: Schedule, query: Schedule) -> list[int]:
        """Patches of every picture behind the first cut (0) and in the end (1); `last` is `queries` of the layout."""
        return [
            (query if last[row] == i else others).left(grid.patches, stage)
            if row in last
            else count(self.budget, grid.patches)
            for i, (row, grid) in enumerate(zip(layout.sample, layout.grids, strict=True))
        ]

    def cover(self, seen: Seen, layout: Layout, left: partial) -> Reduction:
        """Pure: features and the mean embedding of every picture's text in, what enters the LLM out."""
        features, text = map(upcast, seen.values())
        # the cosine of (unit, 1) to another such vector is that of both units, brought to 0..1
        unit = pad(normalize(features, dim=-1), (0, 1), value=1.0)
        like = (1 + cosine_similarity(features, text[:, None], dim=-1)) / 2
        images = zip(unit, layout.patches, layout.grids, strict=True)
        covers = [[Cover.of_each_other(x[: grid.tokens], mine[: grid.tokens])] for x, mine, grid in images]
        counts = left(layout, queries(layout), 0)
        return select_covering(covers, counts, layout, self.newlines, bonus=self.alignment * like)

    def gain(self, seen: Seen, layout: Layout, left: partial) -> Reduction:
        """Pure: attention in two layers, states and the mean state of the query in, which demonstrations stay out."""
        before, now, hidden, query = seen.values()
        last = queries(layout)
        if not last:
            return Reduction(layout.alive, layout.alive_counts, layout.alive_patches)
        scores = (now - before).clamp(min=0) + self.likeness * cosine_similarity(upcast(hidden), query[:, None], dim=-1)
        role = [row if row in last and last[row] != i else -1 for i, row in enumerate(layout.sample)]
        wanted = left(layout, last, 1)
        counts = [sum(n for n, mine in zip(wanted, role, strict=True) if mine == row) for row in last]
        rows, role = upload(list(last), scores.device), upload(role, scores.device)
        pools = ((role == rows[:, None])[..., None] & layout.patches).flatten(1)
        kept = top_k(scores.flatten().expand(len(pools), -1), counts, pools).any(0).view_as(layout.patches)
        return self.kept(kept | (layout.patches & (role < 0)[:, None]), layout, None, scores)

    def resemble(self, seen: Seen, layout: Layout, left: partial) -> Reduction:
        """Pure: states and the mean state of the context in, what stays of the query's picture out."""
        hidden, context = seen.values()
        last, scores = queries(layout), cosine_similarity(upcast(hidden), context[:, None], dim=-1)
        wanted = zip(left(layout, last, 1), layout.grids, strict=True)
        counts = [n if i in last.values() else grid.patches for i, (n, grid) in enumerate(wanted)]
        return self.best(scores, layout, counts)
