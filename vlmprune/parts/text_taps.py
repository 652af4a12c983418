"""Taps on what was asked: the words of a prompt before the language model has read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vlmprune.parts.attention import upcast
from vlmprune.parts.cuts import Decoder, Place
from vlmprune.parts.layers import DecoderLayer, Scene
from vlmprune.parts.layout import upload
from vlmprune.parts.taps import DecoderTap
from vlmprune.parts.templates import QuestionMarks

if TYPE_CHECKING:
    from vlmprune.parts.facts import ModelFacts

__all__ = ["OwnText", "QuestionIds", "QuestionWords"]


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


def visual_entries(scene: Scene) -> torch.Tensor:
    """`(batch, length)` bool, the visual tokens."""
    real = scene.sequence.asked()
    visual = torch.zeros(real.numel(), dtype=torch.long, device=real.device)
    visual = visual.scatter_add(0, scene.flat_index().flatten(), scene.layout.alive.long().flatten())
    return visual.view_as(real) > 0


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
