"""Right answers to a user's prompts, and how near an answer comes to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmprune.eval.scores import score

if TYPE_CHECKING:
    from vlmprune.eval.fidelity.measure import StudyRow
    from vlmprune.runtime.prompts import Pair

__all__ = ["Labels"]


@dataclass(frozen=True)
class Labels:
    """The answers that count as right, by picture and prompt, compared by one of `scores.METRICS`."""

    metric: str
    answers: Mapping[tuple[str, str], Sequence[str]]

    @classmethod
    def of(cls, pairs: Iterable[Pair], metric: str) -> Labels | None:
        """Those of prompts; None where they have none."""
        given = {(pair.picture, pair.prompt): pair.answers for pair in pairs if pair.answers}
        return cls(metric, given) if given else None

    def right(self, row: StudyRow) -> Sequence[str]:
        """The right answers to a row's prompt."""
        return self.answers[row.picture, row.prompt]

    def scores(self, row: StudyRow) -> tuple[float, float]:
        """Of the unpruned model's answer and of the pruned one's, 0 to 1."""
        wanted = self.right(row)
        return score(self.metric, row.unpruned, wanted), score(self.metric, row.pruned, wanted)

    def loss(self, row: StudyRow) -> float:
        """What pruning lost; below 0 where it gained."""
        unpruned, pruned = self.scores(row)
        return unpruned - pruned
