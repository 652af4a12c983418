"""MMTok (arXiv 2508.18264; code Ironieser/MMTok)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from vlmprune.methods.base import AnyNewlines, Asking, BeforeLLM, Layout, ModelFacts, Reduction, Seen, Tap, register
from vlmprune.parts import Cover, Hidden, Positive, QuestionWords, Range, Weight, features_of, select_covering

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


@register("mmtok")
@dataclass(frozen=True)
class MMTok(Asking, BeforeLLM):
    """Keep patches that cover both the words of the question and the picture.

    Every word of the question, by its input embedding, and every patch, by its features in the tower, is to be covered
    by a kept patch. How well each patch does it is a softmax over patches: of cosines between words and projected
    patches, and between patches. Greedily the patch that adds most is kept. In a later turn the picture stays as it was
    pruned for an earlier question.

    Args:
        alpha: weight of the picture beside the words (code: 0.5).
        text_temperature, vision_temperature: of the two softmaxes (code: 0.02 and 0.2).
        question: a processor, whose chat template marks it (the command and the evaluation ask theirs); None takes all
            text behind the last picture for it.
    """

    summary = "patches that cover the words of the question and the picture"
    paper = "arXiv 2508.18264"
    needs = "the question, tower features"
    looks_at = "question"

    alpha: Annotated[Weight, Range(0, 4)] = 0.5
    text_temperature: Annotated[Positive, Range(0.005, 0.2, log=True)] = 0.02
    vision_temperature: Annotated[Positive, Range(0.02, 2, log=True)] = 0.2
    newlines: AnyNewlines = "all"

    def see(self, facts: ModelFacts) -> tuple[Tap, ...]:
        asked = self.question
        without = () if asked is None else (asked.words(STOP_WORDS), tuple(map(asked.sentence, FRAMES)))
        return Hidden(), features_of(facts), QuestionWords(0, asked, *without)

    def reduce(self, seen: Seen, layout: Layout) -> Reduction:
        """Pure: projected patches, tower features and the question's embeddings in, decision out."""
        projected, *_, features, words = (next(iter(seen.values())), *seen.values())  # the first two may be one
        among = self.among(layout)
        covers = []
        for i, grid in enumerate(layout.grids):
            mine, there, own = among[i, : grid.tokens], (words[i] != 0).any(-1), features[i, : grid.tokens]
            told, shown = 1 / there.sum().clamp(min=1), self.alpha / mine.sum().clamp(min=1)
            asked = Cover(words[i], projected[i, : grid.tokens], mine, there, self.text_temperature, told)
            covers.append([asked, Cover.of_each_other(own, mine, self.vision_temperature, shown)])
        return select_covering(covers, self.budget, layout, self.newlines)
