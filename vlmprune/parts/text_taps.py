"""Taps on what was asked: the words of a prompt before the language model has read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from vlmprune.errors import UnsupportedError
from vlmprune.parts.attention import (
    Visible,
    attention_mass,
    last_rows,
    masses_by_head,
    mean_weight,
    take_rows,
    upcast,
)
from vlmprune.parts.cuts import Decoder, Place
from vlmprune.parts.layers import DecoderLayer, Scene
from vlmprune.parts.layout import Layout, download, upload
from vlmprune.parts.selection import top_k
from vlmprune.parts.taps import DecoderTap, decoder_mass, visual_entries
from vlmprune.parts.templates import QuestionMarks

if TYPE_CHECKING:
    from vlmprune.parts.facts import ModelFacts

__all__ = ["MeanState", "OwnText", "QuestionIds", "QuestionWords", "Rated", "Raters", "queries", "raters", "strongest"]

HEADS = 14 / 32  # of the heads that SparseVLM's "+" listens to


@dataclass(frozen=True)
class QuestionTap(DecoderTap):
    """What both taps share: which tokens are the question.

    That is the last thing that a user says in the prompt, in front of its pictures or behind them, for all pictures of
    the prompt; without a `question`, all text behind the last picture, or all text where there is none. Of a
    conversation that goes on, what the call brings.

    Args:
        question: how a chat template marks it.
        without: ids that do not count, as long as others are left.
        sentences: ids of sentences that do not count (`QuestionMarks.sentence`).
    """

    layer: int = 0
    question: QuestionMarks | None = None
    without: tuple[int, ...] = ()
    sentences: tuple[tuple[int, ...], ...] = ()

    def misfit(self, at: Place, facts: ModelFacts) -> str | None:
        here = None if at == Decoder(0) and self.layer == 0 else "the words of a prompt are seen at Decoder(0) alone"
        return here or super().misfit(at, facts)

    def asked(self, scene: Scene) -> torch.Tensor:
        """`(batch, length)` bool, the tokens of the question."""
        ids, real, visual = scene.ids, scene.sequence.asked(), visual_entries(scene)
        text = real & ~visual
        if self.question is None:
            after = text & (visual.flip(1).cumsum(1).flip(1) == 0)
            said = torch.where(after.any(1, keepdim=True), after, text)
        else:
            said = text & between(ids, real, self.question.opens, self.question.closes)
            said = said & ~among(ids, self.question.silent)
        for sentence in self.sentences:
            said = fewer(said, spans(ids, sentence))
        return fewer(said, among(ids, self.without))

    def rows(self, scene: Scene) -> tuple[torch.Tensor, torch.Tensor]:
        """`(images, words)` indices into the flattened batch, and bool which of them there are."""
        said, layout = self.asked(scene), scene.layout
        visual = [0] * len(said)
        for row, tokens in zip(layout.sample, layout.alive_counts, strict=True):
            visual[row] += tokens
        most = said.shape[1] - min(visual[row] for row in layout.sample)
        order = (~said).to(torch.uint8).sort(dim=1, stable=True).indices[:, : max(1, most)]
        sample = upload(layout.sample, said.device)
        return (order + torch.arange(len(said), device=said.device)[:, None] * said.shape[1])[sample], \
            said.gather(1, order)[sample]  # fmt: skip


@dataclass(frozen=True)
class QuestionWords(QuestionTap):
    """Input embeddings of the question's tokens, `(images, words, dim)`; zeros where a question is shorter."""

    def measure(self, layer: DecoderLayer, hidden: torch.Tensor, scene: Scene) -> torch.Tensor:
        index, there = self.rows(scene)
        return hidden.flatten(0, 1)[index] * there[..., None]


@dataclass(frozen=True)
class QuestionIds(QuestionTap):
    """Ids of the question's tokens, `(images, words)` long; -1 where a question is shorter."""

    def measure(self, layer: DecoderLayer, hidden: torch.Tensor, scene: Scene) -> torch.Tensor:
        index, there = self.rows(scene)
        return torch.where(there, scene.ids.flatten()[index], -1)


@dataclass(frozen=True)
class OwnText(QuestionTap):
    """Mean input embedding of every picture's own text, `(images, dim)` float32 or better; zeros where there is none.

    That is what stands behind the picture up to the next one; of pictures that stand together, what stands behind the
    last of them. A picture that is alone in its prompt has the question, and so has one with no text behind it.
    """

    def measure(self, layer: DecoderLayer, hidden: torch.Tensor, scene: Scene) -> torch.Tensor:
        layout, visual, asked = scene.layout, visual_entries(scene), self.asked(scene)
        silent = () if self.question is None else self.question.silent
        text, columns = scene.sequence.asked() & ~visual & ~among(scene.ids, silent), scene.sequence.columns
        end = upload([[max(0, grid.tokens - 1)] for grid in layout.grids], hidden.device)
        never, means = scene.sequence.prompt, []
        for row, last in zip(layout.sample, layout.position.gather(1, end), strict=True):
            own = text[row] & (columns[row] > last)
            first = columns[row].masked_fill(~own, never).amin()
            following = visual[row] & (columns[row] > first)
            own = own & (columns[row] < columns[row].masked_fill(~following, never).amin())
            own = asked[row] if layout.sample.count(row) == 1 else torch.where(own.any(), own, asked[row])
            states = upcast(hidden[row])
            means.append(own.to(states) @ states / own.sum().clamp(min=1))
        return torch.stack(means)


def queries(layout: Layout) -> dict[int, int]:
    """The last picture of every prompt that has several, by batch row."""
    order = layout.ordinal
    if len({bool(grid.frames) for grid in layout.grids}) > 1:  # videos are counted behind all images
        order = download(layout.position[:, 0])
    last = {layout.sample[i]: i for i in sorted(range(len(layout)), key=order.__getitem__)}
    return {row: i for row, i in last.items() if layout.sample.count(row) > 1}


@dataclass(frozen=True)
class MeanState(DecoderTap):
    """Mean state at a decoder layer's input of all tokens from the query's picture on, or of all in front of it.

    Arrives as `(images, dim)` float32 or better, for all pictures of a prompt the same; zeros for a picture alone.
    """

    part: Literal["query", "context"] = "query"

    def measure(self, layer: DecoderLayer, hidden: torch.Tensor, scene: Scene) -> torch.Tensor:
        columns, real = scene.sequence.columns, scene.sequence.asked()
        means = upcast(hidden.new_zeros(len(hidden), hidden.shape[-1]))
        for row, i in queries(scene.layout).items():
            behind = columns[row] >= scene.layout.position[i, 0]
            mine = real[row] & (behind if self.part == "query" else ~behind)
            means[row] = mine.to(means) @ hidden[row].to(means) / mine.sum().clamp(min=1)
        return means[upload(scene.layout.sample, hidden.device)]


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
        left = scene.sequence
        rows, weight = last_rows(left.asked(), *scene.text_after)
        rates = mean_weight(raters(hidden, take_rows(hidden, rows), visual_entries(scene), weight > 0))
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
            raise UnsupportedError("What heads look at most ('+') cannot be told behind a cache: start a new prompt.")
        normed, (cos, sin) = layer.normed(hidden), left.rotary
        query = layer.queries(take_rows(normed, rows), take_rows(cos, rows), take_rows(sin, rows))
        heads, visible = query.shape[1], Visible(rows, left.asked(), layer.window or 0)
        each = weight[:, None].expand(-1, heads, -1)
        mass = masses_by_head(query, layer.keys(normed, cos, sin), layer.scale, each, visible)
        # a query and a key of ones, turned: what the distance of two tokens alone is worth
        turned = torch.cat((cos, sin), -1)
        near = attention_mass(take_rows(turned, rows)[:, None], turned[:, None], layer.scale, visible, weight)
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


def fewer(said: torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
    """Take tokens from `(batch, length)`, unless none would be left of a row."""
    left = said & ~gone
    return torch.where(left.any(1, keepdim=True), left, said)


def among(ids: torch.Tensor, some: tuple[int, ...]) -> torch.Tensor:
    """Which of some ids are these."""
    return torch.isin(ids, upload(some, ids.device)) if some else torch.zeros_like(ids, dtype=torch.bool)


def starts(ids: torch.Tensor, pattern: tuple[int, ...]) -> torch.Tensor:
    """`(batch, length)` bool, where a pattern begins."""
    found = torch.zeros_like(ids, dtype=torch.bool)
    last = ids.shape[1] - len(pattern) + 1
    if last > 0:
        hits = [ids[:, i : i + last] == token for i, token in enumerate(pattern)]
        found[:, :last] = torch.stack(hits).all(0) if hits else False
    return found


def spans(ids: torch.Tensor, pattern: tuple[int, ...]) -> torch.Tensor:
    """`(batch, length)` bool, where a pattern stands, and the token in front of it."""
    begins, marked = starts(ids, pattern), torch.zeros_like(ids, dtype=torch.bool)
    for i in range(-1, len(pattern)):
        marked |= begins.roll(i, 1) if pattern else False
    return marked


def between(ids: torch.Tensor, real: torch.Tensor, opens: tuple[int, ...], closes: tuple[int, ...]) -> torch.Tensor:
    """`(batch, length)` bool, what stands behind the last `opens`, up to the first `closes` from there."""
    column = torch.arange(ids.shape[1], device=ids.device)
    begin = (starts(ids, opens) & real) * (column + len(opens))
    begin = begin.amax(1, keepdim=True)
    end = (starts(ids, closes) & real & (column >= begin)) if closes else torch.zeros_like(real)
    return (column >= begin) & (end.cumsum(1) == 0)
