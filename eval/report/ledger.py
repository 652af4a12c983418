"""The ledger: a paper's numbers beside ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmprune.eval.report.document import Table
from vlmprune.eval.report.rows import Results, Row
from vlmprune.eval.report.tables import COUNTS, NONE, counts, number
from vlmprune.spec import budget_text

__all__ = ["LedgerLine", "lines", "table"]

NUMBERS = ("paper", "ours", "difference", *COUNTS)
HEADER = ("model", "method", "budget", "task", "metric", *NUMBERS, "note", "definition", "source")


@dataclass(frozen=True)
class LedgerLine:
    """One published number; `ours` is in the paper's unit, or None with the reason in `note`."""

    model: str | None
    method: str
    budget: str
    task: str
    metric: str
    paper: float
    ours: float | None
    difference: float | None
    note: str
    definition: str
    source: str


def lines(results: Results) -> list[LedgerLine]:
    """All published numbers of the config, in its order."""
    return [line(results, entry) for entry in results.info.get("published") or []]


def line(results: Results, entry: Mapping[str, Any]) -> LedgerLine:
    """One published number with ours beside it.

    A share (0..1) is shown in per cent where the paper's number can only be per cent; the note says so.
    """
    paper, metric = float(entry["value"]), entry["metric"]
    mine = [cell for cell in results.cells if about(cell["cell"], entry)]
    good = [cell for cell in mine if not cell["error"]]
    note = lacking(mine, good, metric)
    ours, note = (None, note) if note else our_number(good, metric, paper)
    difference = None if ours is None else ours - paper
    words = (entry["task"], metric, paper, ours, difference, note, entry["definition"], entry["source"])
    return LedgerLine(entry.get("model"), entry["method"], budget_of(entry), *words)


def our_number(good: Sequence[Mapping[str, Any]], metric: str, paper: float) -> tuple[float, str]:
    """The mean of what cells measured, in the paper's unit, and what is to be said of it."""
    ours = float(np.mean([value_of(cell, metric) for cell in good]))
    if paper > 1.5 and 0 <= ours <= 1:
        return 100 * ours, "; ".join(["ours times 100", *partial(good)])
    return ours, "; ".join(partial(good))


def value_of(cell: Mapping[str, Any], metric: str) -> float | None:
    """What a cell measured, if it did."""
    return (cell["metrics"].get(metric) or {}).get("value")


def lacking(mine: Sequence[Mapping[str, Any]], good: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Why there is no number of ours, of the cells that it is about and those of them that did not fail."""
    if not good:
        return "failed" if mine else "not evaluated here"
    without = next((cell["metrics"] for cell in good if value_of(cell, metric) is None), None)
    return "" if without is None else f"the task gave no {metric}, but {', '.join(sorted(without))}"


def partial(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to say of cells that answered a part of their task only."""
    limited = any(cell["depends"].get("limit") for cell in cells)
    return [f"ours on the first {len(cells[0]['samples'])} samples only"] if limited else []


def budget_of(entry: Mapping[str, Any]) -> str:
    """The entry's budget as text."""
    return budget_text({word: entry[word] for word in ("keep", "average") if entry.get(word) is not None})


def about(cell: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    """Whether a cell is what a published number is about; the unpruned model goes by its method, others by label."""
    same = cell["method"] == "none" if entry["method"] == "none" else cell["label"] == entry["method"]
    model = entry.get("model") in (None, cell["model"])
    return same and model and cell["task"] == entry["task"] and budget_text(cell["budget"]) == budget_of(entry)


def table(results: Results, found: Sequence[LedgerLine]) -> Table:
    """The ledger as a table."""
    rows = [table_row(one, next((r for r in results.rows if is_row(r, one)), None)) for one in found]
    return Table(HEADER, rows, [i for i, name in enumerate(HEADER) if name not in NUMBERS])


def table_row(one: LedgerLine, row: Row | None) -> list[str]:
    """A line's cells, with the counts of the row that our number comes from."""
    tokens = [NONE] * len(COUNTS) if row is None else counts(row)
    numbers = [f"{one.paper:g}", number(one.ours, 2), number(one.difference, 2, sign=True), *tokens]
    about = [one.model or NONE, one.method, one.budget, one.task, one.metric]
    return [*about, *numbers, one.note, one.definition, one.source]


def is_row(row: Row, one: LedgerLine) -> bool:
    """Whether a row is the one that a line's own number comes from."""
    same = row.full if one.method == "none" else row.label == one.method
    return same and one.model in (None, row.model) and (row.budget, row.task) == (one.budget, one.task)
