"""What a method must reach, where `vlmprune fidelity` guards a pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmprune.runtime.errors import CommandError

if TYPE_CHECKING:
    from vlmprune.eval.fidelity.costs import EntryCosts
    from vlmprune.eval.fidelity.measure import StudyLine
    from vlmprune.eval.fidelity.report import Study

__all__ = ["Least"]


@dataclass(frozen=True)
class Least:
    """The least agreement and speed-up, and the most loss; None asks for nothing."""

    agreement: float | None
    speedup: float | None
    loss: float | None

    def check(self, told: Study) -> None:
        """Fail where a method (no control) is not as good as was asked for.

        Raises:
            CommandError: one is.
        """
        lines = (line for line in told.lines if not line.entry.control)
        if wrong := [f"{line.entry.label}: {why}" for line in lines for why in self.lacks(line, told.costs)]:
            raise CommandError("; ".join(wrong))

    def lacks(self, line: StudyLine, costs: Mapping[str, EntryCosts]) -> Iterator[str]:
        """What a method does not reach."""
        if self.agreement is not None and (same := line.measures["answer_agrees"].value) < self.agreement:
            yield f"{same:.3f} of the answers stay the same, under {self.agreement:g}"
        if self.loss is not None and (lost := -line.score.change.value) > self.loss:
            yield f"the score loses {lost:.3f}, more than {self.loss:g}"
        timed = self.speedup is not None and line.entry.label in costs
        if timed and (fast := costs[line.entry.label].first["median"]) < self.speedup:
            yield f"the first token comes {fast:.2f} times as fast, under {self.speedup:g}"
