"""What a report is made of: rows, and what is wrong with the run.

One `Row` is one method at one budget on one task, or on all tasks (`task` is None): there the score is the retention,
the mean of the tasks' ratios to the unpruned model. Tables, plots, CSV and JSON are made from rows and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

__all__ = ["COLUMNS", "DAMAGED", "FAILED", "MISSING", "NEAR", "OK", "OTHER", "PARTLY", "Problem", "Results", "Row"]

#: States of a row; a row over all tasks is `incomplete` when a task is missing.
OK, FAILED, MISSING, PARTLY, OTHER = "ok", "failed", "missing", "incomplete", "other samples"
#: State of a cell whose file is there and cannot be used.
DAMAGED = "damaged"

#: How far apart, as a share, the layer averages of a method on its own schedule and of its `random` may be.
NEAR = 0.05


@dataclass
class Row:
    """One method at one budget on one task. Scores are in the metric's own unit, times in seconds, tokens per request.

    Intervals are 95 %. `full_*` and `random_*` are the differences to the unpruned model and to `random` at the same
    budget; a method on a schedule of its own has no budget, and `random_base` names the row of `random` that has about
    as many tokens in the mean over layers. A field is None where there is no such number; `note` says why.
    """

    model: str
    method: str
    label: str
    budget: str
    keep: int | float | None
    average: int | float | None
    control: bool
    task: str | None
    metric: str | None = None
    higher_is_better: bool = True
    state: str = MISSING
    note: str = ""
    seeds: int = 1
    value: float | None = None
    low: float | None = None
    high: float | None = None
    spread: float | None = None
    full_difference: float | None = None
    full_low: float | None = None
    full_high: float | None = None
    full_verdict: str | None = None
    random_difference: float | None = None
    random_low: float | None = None
    random_high: float | None = None
    random_verdict: str | None = None
    random_base: str | None = None
    retention: float | None = None
    retention_low: float | None = None
    retention_high: float | None = None
    samples: int | None = None
    clusters: int | None = None
    tokens_before: float | None = None
    tokens_after: float | None = None
    layer_average: float | None = None
    ttft_s: float | None = None
    decode_tokens_per_s: float | None = None
    peak_memory_bytes: int | None = None
    elapsed_s: float | None = None

    @property
    def full(self) -> bool:
        """Whether this is the unpruned model."""
        return self.method == "none"

    @property
    def name(self) -> str:
        """`fopru keep 0.25`."""
        return f"{self.label} {self.budget}".strip()

    def add_note(self, text: str) -> None:
        """Say one thing more about the row."""
        self.note = "; ".join(filter(None, [self.note, text]))


COLUMNS = tuple(f.name for f in fields(Row))


@dataclass(frozen=True)
class Problem:
    """A planned cell that is not in the comparison, and why."""

    cell: str
    state: str
    why: str


@dataclass
class Results:
    """All there is to say about a run: `info` is its run.json, `cells` what the cell files hold."""

    info: Mapping[str, Any]
    cells: Sequence[Mapping[str, Any]]
    rows: list[Row] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def models(self) -> list[str]:
        """The models, in the order of the plan."""
        return list(dict.fromkeys(row.model for row in self.rows))

    def tasks(self, model: str) -> list[str]:
        """The model's tasks, in the order of the plan."""
        return list(dict.fromkeys(row.task for row in self.rows if row.model == model and row.task is not None))

    def of(self, model: str, task: str | None) -> list[Row]:
        """The rows of a model on a task, or on all (None): the full model, then budget by budget."""
        return [row for row in self.rows if row.model == model and row.task == task]
