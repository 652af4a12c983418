"""The ledger: a paper's numbers beside ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmprune.eval.report.document import Table
from vlmprune.eval.report.rows import Results
from vlmprune.eval.report.tables import COUNTS, counts, number
from vlmprune.spec import budget_text

__all__ = ["Line", "lines", "table"]


@dataclass(frozen=True)
class Line:
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


def lines(results: Results) -> list[Line]:
    """All published numbers of the config, in its order."""
    return [line(results, entry) for entry in results.info.get("published") or []]


def line(results: Results, entry: Mapping[str, Any]) -> Line:
    """One published number with ours beside it.

    A share (0..1) is shown in per cent where the paper's number can only be per cent; the note says so.
    """
    model, paper = entry.get("model"), float(entry["value"])
    budget = budget_of(entry)
    mine = [cell for cell in results.cells if about(cell["cell"], entry)]
    good = [cell for cell in mine if not cell["error"]]
    ours, note = None, ""
    if not mine:
        note = "not evaluated here"
    elif not good:
        note = "failed"
    elif missing := [c for c in good if (c["metrics"].get(entry["metric"]) or {}).get("value") is None]:
        note = f"the task gave no {entry['metric']}, but {', '.join(sorted(missing[0]['metrics']))}"
    else:
        ours = float(np.mean([cell["metrics"][entry["metric"]]["value"] for cell in good]))
        if paper > 1.5 and 0 <= ours <= 1:
            ours, note = 100 * ours, "ours times 100"
        if any(cell["depends"].get("limit") for cell in good):
            part = f"ours on the first {len(good[0]['samples'])} samples only"
            note = f"{note}; {part}" if note else part
    difference = None if ours is None else ours - paper
    words = (entry["task"], entry["metric"], paper, ours, difference, note, entry["definition"], entry["source"])
    return Line(model, entry["method"], budget, *words)


def budget_of(entry: Mapping[str, Any]) -> str:
    """The entry's budget as text."""
    return budget_text({word: entry[word] for word in ("keep", "average") if entry.get(word) is not None})


def about(cell: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    """Whether a cell is what a published number is about; the unpruned model goes by its method, others by label."""
    same = cell["method"] == "none" if entry["method"] == "none" else cell["label"] == entry["method"]
    model = entry.get("model") in (None, cell["model"])
    return same and model and cell["task"] == entry["task"] and budget_text(cell["budget"]) == budget_of(entry)


def table(results: Results, found: Sequence[Line]) -> Table:
    """The ledger as a table."""
    header = ["model", "method", "budget", "task", "metric", "paper", "ours", "difference", *COUNTS]
    header += ["note", "definition", "source"]
    rows = []
    for one in found:
        row = next((r for r in results.rows if is_row(r, one)), None)
        tokens = counts(row) if row is not None else ["-", "-"]
        numbers = [f"{one.paper:g}", number(one.ours, 2), number(one.difference, 2, sign=True), *tokens]
        about = [one.model or "-", one.method, one.budget, one.task, one.metric]
        rows.append([*about, *numbers, one.note, one.definition, one.source])
    texts = [i for i, name in enumerate(header) if name not in ("paper", "ours", "difference", *COUNTS)]
    return Table(header, rows, texts)


def is_row(row: Any, one: Line) -> bool:
    """Whether a row is the one that a line's own number comes from."""
    same = row.full if one.method == "none" else row.label == one.method
    return same and one.model in (None, row.model) and (row.budget, row.task) == (one.budget, one.task)
