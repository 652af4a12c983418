"""CDPruner (arXiv 2506.10967; code Theia-4869/CDPruner)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch.nn.functional import normalize

from vlmprune.methods.base import AnyNewlines, Asking, Cut, Decoder, Layout, ModelFacts, Reduction, Seen, register
from vlmprune.parts import (
    Hidden,
    QuestionIds,
    QuestionWords,
    clip_for,
    download,
    features_of,
    select_weighted,
    told_clip,
    upcast,
)

__all__ = ["CDPruner", "likeness", "rescaled"]


def likeness(patches: torch.Tensor, texts: torch.Tensor, there: torch.Tensor | None = None) -> torch.Tensor:
    """Mean cosine of every patch to some texts, `(..., tokens)` float32 or better.

    Args:
        patches: `(..., tokens, dim)`; texts: `(..., texts, dim)`; there: `(..., texts)` bool, which texts count.
    """
    cosine = normalize(upcast(patches), dim=-1) @ normalize(upcast(texts), dim=-1).transpose(-1, -2)
    if there is None:
        return cosine.mean(-1)
    return (cosine * there[..., None, :]).sum(-1) / there.sum(-1).clamp(min=1)[..., None]


def rescaled(scores: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """`(images, tokens)` scores over 0 and up to 1 among the tokens of an image; 1 where all are alike."""
    low = scores.masked_fill(~among, torch.inf).amin(-1, keepdim=True)
    high = scores.masked_fill(~among, -torch.inf).amax(-1, keepdim=True)
    return torch.where(high > low, (scores - low + 1e-6) / (high - low), 1)


@register("cdpruner")
@dataclass(frozen=True)
class CDPruner(Asking):
    """Keep patches that matter to the question and differ from each other: a determinantal point process.

    The kernel is the cosine of projected patches, with the relevance of both on either side; greedily the patch is kept
    that makes its determinant largest. In a later turn the picture stays as it was pruned for an earlier question.

    Args:
        relevance: "clip" (code) asks both halves of the CLIP model whose tower it is, and takes what is *less* like the
            text, for patches of the subject are less like it there. "embeddings" needs no other model: the mean cosine
            of a projected patch to the input embeddings of the question (ours; what is more like it counts).
        clip: a folder or an id on the hub, or a `vlmprune.parts.Clip`. None takes the checkpoint that the tower came
            from, where the model's config tells it.
        question: a processor, whose chat template marks it (the command and the evaluation ask theirs); None takes all
            text behind the last picture for it, and "clip" cannot do without.
    """

    summary = "patches that matter to the question and differ from each other"
    paper = "arXiv 2506.10967"
    needs = "the question, features; CLIP's text tower (or relevance='embeddings')"
    looks_at = "question"
    syncs = 1
    plain_with: ClassVar[dict[str, Any]] = {"relevance": "embeddings", "clip": None}

    relevance: Literal["clip", "embeddings"] = "clip"
    clip: Annotated[Any, told_clip] = None
    newlines: AnyNewlines = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.relevance == "embeddings" and self.clip is not None:
            raise ValueError("cdpruner: clip= is what relevance='clip' asks, and relevance='embeddings' asks no model.")

    def cuts(self, facts: ModelFacts) -> list[Cut]:
        if self.relevance == "embeddings":
            see, reduce = (Hidden(), QuestionWords(0, self.question)), self.by_embeddings
        else:
            clip_for("cdpruner", self.clip, facts.tower_from, self.question)
            see = (Hidden(), features_of(facts), QuestionIds(0, self.question))
            reduce = partial(self.by_clip, where=facts.tower_from)
        return [Cut(Decoder(0), see, reduce, self.positions)]

    def by_embeddings(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: projected patches and the question's embeddings in, decision out."""
        features, words = seen.values()
        return self.choose(features, likeness(features, words, (words != 0).any(-1)), layout)

    def by_clip(self, seen: Seen, layout: Layout, where: str | None) -> Reduction:
        """Projected patches, the tower's features and the ids of the question in, decision out."""
        features, tower, ids = seen.values()
        clip, scores = clip_for("cdpruner", self.clip, where, self.question), []
        for patches, row in zip(tower, download(ids), strict=True):
            text = self.question.text([token for token in row if token >= 0])
            scores.append(-likeness(clip.patches(patches), clip.texts(text, patches.device)))
        return self.choose(features, torch.stack(scores), layout)

    def choose(self, features: torch.Tensor, relevance: torch.Tensor, layout: Layout) -> Reduction:
        """By `(images, tokens)` relevance of any scale."""
        among = self.among(layout)
        reduction = select_weighted(features, rescaled(relevance, among), self.budget, layout, self.newlines)
        return replace(reduction, scores=relevance)
