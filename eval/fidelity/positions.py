"""Agreement and KL by position in the answer: what holds for a first word need not for a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from vlmprune.eval import statistics
from vlmprune.eval.fidelity.measure import StudyRow, Values, by_prompt, drawn, stretches
from vlmprune.eval.statistics import Estimate

__all__ = ["AnswerPart", "along"]


@dataclass(frozen=True)
class AnswerPart:
    """Positions `first` to `last` of the answers, counted from 1.

    Attributes:
        prompts: whose unpruned answer has tokens there.
        next_agrees: share of these tokens that are the pruned model's likeliest, after the unpruned answer before them.
        same_so_far: share of all prompts whose greedy answers are the same up to `last`, or to their end.
        kl: in nats per token, teacher-forced as `next_agrees`.
    """

    first: int
    last: int
    prompts: int
    next_agrees: Estimate
    same_so_far: Estimate
    kl: Estimate


def along(rows: Iterable[StudyRow]) -> dict[str, list[AnswerPart]]:
    """The stretches of every label; a prompt counts once in each, seeds are averaged, pictures are drawn."""
    return {label: of_label(list(prompts.items())) for label, prompts in by_prompt(rows).items()}


def of_label(prompts: Sequence[tuple[tuple[str, str], Sequence[StudyRow]]]) -> list[AnswerPart]:
    """The stretches of one label's rows, by picture and prompt."""
    longest = max(answer_length(row) for _, some in prompts for row in some)
    made: list[AnswerPart] = []
    for i, (first, last) in enumerate(stretches(longest) if longest else []):
        read = {pair: in_stretch(some, i) for pair, some in prompts if len(some[0].compared.along) > i}
        same = {pair: [float(np.mean([same_up_to(row, last) for row in some]))] for pair, some in prompts}
        (agrees, kl), (so_far,) = means(read, (1.0, None)), means(same, (1.0,))
        made.append(AnswerPart(first, last, len(read), agrees, so_far, kl))
    return made


def answer_length(row: StudyRow) -> int:
    """Tokens of the unpruned answer."""
    return sum(tokens for tokens, _, _ in row.compared.along)


def same_up_to(row: StudyRow, last: int) -> bool:
    """Whether the answers are the same up to a position; one that ended the same stays the same."""
    return row.compared.answer_agrees or row.compared.same_for >= last


def in_stretch(rows: Sequence[StudyRow], i: int) -> list[float]:
    """Share of tokens that agree and KL per token of a prompt in its i-th stretch."""
    tokens, agreeing, kl = np.sum([row.compared.along[i] for row in rows], 0)
    return [float(agreeing / tokens), float(kl / tokens)]


def means(values: Values, tops: Sequence[float | None]) -> list[Estimate]:
    """Means over prompts with intervals over pictures."""
    pictures, table = [picture for picture, _ in values], np.array(list(values.values()))
    draws, count = drawn(pictures, table), len(set(pictures))
    return [
        statistics.mean(draw, float(mean), count, top)
        for draw, mean, top in zip(draws, table.mean(0), tops, strict=True)
    ]
