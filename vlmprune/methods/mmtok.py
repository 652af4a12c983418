"""MMTok (arXiv 2508.18264; code Ironieser/MMTok)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

from vlmprune.methods.base import Pruner, register
from vlmprune.parts import (
    AnyNewlines,
    Cover,
    Cut,
    Decoder,
    Hidden,
    Layout,
    ModelFacts,
    Must,
    QuestionMarks,
    QuestionWords,
    Range,
    Reduction,
    Seen,
    candidates,
    features_of,
    is_number,
    question_of,
    select_covering,
    told_question,
)

__all__ = ["FRAMES", "STOP_WORDS", "MMTok"]

#: Words that say nothing of a picture: the kinds that the released code leaves out.
STOP_WORDS = (
    "a an the is are was were be been am do does did have has had i you he she it we they this that these those "
    "what which who whom whose where when why how and or but so if then to for with by from at into onto upon "
    "question answer"
).split()
#: Sentences of benchmarks around a question, which the released code cuts off.
FRAMES = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
TEMPERATURE = Must("a number above 0", lambda value: is_number(value, most=float("inf")) and value > 0)


@register("mmtok")
@dataclass(frozen=True)
class MMTok(Pruner):
    """Keep patches that cover both the words of the question and the picture.

    Every word of the question, by its input embedding, and every patch, by its features in the tower, is to be covered
    by a kept patch. How well each patch does it is a softmax over patches: of cosines between words and projected
    patches, and between patches. Greedily the patch that adds most is kept.

    Args:
        keep, average: patches per image, or a fraction. The released code keeps so many in every tile of LLaVA-NeXT;
            here all tiles of an image compete.
        alpha: weight of the picture beside the words (code: 0.5).
        text_temperature, vision_temperature: of the two softmaxes (code: 0.02 and 0.2).
        question: how a chat template marks a question: a processor, which the command and the evaluation ask. None
            takes all text behind the last picture for it.
        positions, newlines: as everywhere.

    Words are the prompt's own tokens without stop words, where the released code takes words apart and tokenizes them
    anew: of a long word whose first token is a stop word that token is lost. It also leaves out patches in the
    padding that makes a picture square, which nobody tells us. In a later turn the picture stays as it was pruned for
    an earlier question.
    """

    summary = "patches that cover the words of the question and the picture"
    paper = "arXiv 2508.18264"
    needs = "the question, tower features"
    looks_at = "question"

    alpha: Annotated[float, Must("a number of at least 0", partial(is_number, most=float("inf"))), Range(0, 4)] = 0.5
    text_temperature: Annotated[float, TEMPERATURE, Range(0.005, 0.2, log=True)] = 0.02
    vision_temperature: Annotated[float, TEMPERATURE, Range(0.02, 2, log=True)] = 0.2
    question: Annotated[QuestionMarks | None, told_question] = None
    newlines: AnyNewlines = "all"

    def told_by(self, processor: Any) -> MMTok:
        return self if self.question is not None else replace(self, question=question_of(processor))

    def cuts(self, facts: ModelFacts) -> list[Cut]:
        asked = self.question
        without = () if asked is None else (asked.words(STOP_WORDS), tuple(map(asked.sentence, FRAMES)))
        words = QuestionWords(0, asked, *without)
        see = dict.fromkeys((Hidden(), features_of(facts), words))
        return [Cut(Decoder(0), tuple(see), self.reduce, self.positions)]

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: projected patches, tower features and the question's embeddings in, decision out."""
        values = list(seen.values())
        projected, features, words = values[0], values[-2], values[-1]  # the first two may be one
        among, _, _ = candidates(layout, self.newlines)
        covers = []
        for i, grid in enumerate(layout.grids):
            mine, there = among[i, : grid.tokens], (words[i] != 0).any(-1)
            patches = projected[i, : grid.tokens], features[i, : grid.tokens]
            told = 1 / there.sum().clamp(min=1)
            seen_too = self.alpha / mine.sum().clamp(min=1)
            covers.append(
                [
                    Cover(words[i], patches[0], mine, there, self.text_temperature, told),
                    Cover(patches[1], patches[1], mine, mine, self.vision_temperature, seen_too),
                ]
            )
        return select_covering(covers, self.budget, layout, self.newlines)
