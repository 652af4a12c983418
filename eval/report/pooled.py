"""The cells of one row, one per seed, as one: what is measured averaged over seeds, sample by sample too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlmprune.eval.report.rows import FAILED, OK, OTHER, Problem, Results, Row

__all__ = ["MEASURED", "Cell", "Pooled", "Questions", "clusters", "identity", "largest", "pool", "spread"]

Cell = Mapping[str, Any]
#: The documents of a cell with their expected answers.
Questions = tuple[tuple[str, str], ...]
#: What is averaged over seeds, and over tasks.
MEASURED = ("tokens_before", "tokens_after", "layer_average", "ttft_s", "decode_tokens_per_s")


@dataclass
class Pooled:
    """A row, the cells it is made of (one per seed), and their scores."""

    row: Row
    cells: list[Cell] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    #: (samples,) in the order of `in_order`, in the metric's unit, averaged over seeds
    scores: np.ndarray | None = None
    #: 1 or 100 where all scores are shares, of one or in per cent
    top: float | None = None


def in_order(cell: Cell) -> list[Mapping[str, Any]]:
    """A cell's samples, in an order that is the same in all cells."""
    return sorted(cell["samples"], key=lambda s: str(s["doc"]))


def identity(cell: Cell) -> Questions:
    """Which questions a cell was asked: documents with their expected answers."""
    return tuple((str(s["doc"]), str(s["target"])) for s in in_order(cell))


def clusters(pooled: Pooled) -> list[str]:
    """Each sample's cluster, in the order of `scores`; a document that is its own cluster is never another task's."""
    task = pooled.row.task
    return [
        f"{task}: {s['doc']}" if str(s["cluster"]) == str(s["doc"]) else str(s["cluster"])
        for s in in_order(pooled.cells[0])
    ]


def pool(results: Results, row: Row, cells: list[Cell], docs: Questions) -> Pooled:
    """Fill a row with what its cells say, averaged over seeds; what keeps a cell out goes to the results' problems."""
    pooled = Pooled(row)
    for cell in cells:
        why = unfit(cell, docs)
        if why is None:
            pooled.cells.append(cell)
            continue
        row.state, row.note = why
        if not cell["error"]:  # which is among the problems already
            advice = ". Evaluate it again." if row.state == OTHER else ""
            results.problems.append(Problem(cell["cell"]["id"], row.state, f"{row.note}{advice}"))
    if pooled.cells:
        fill(pooled, len(cells), len(docs))
    return pooled


def unfit(cell: Cell, docs: Questions) -> tuple[str, str] | None:
    """The state of a cell that cannot be compared with those that were asked `docs`, and why; None where it can."""
    if cell["error"]:
        return FAILED, str(cell["error"])
    if cell["metrics"][cell["metric"]]["value"] is None:
        return FAILED, f"{cell['metric']} has no value"
    if identity(cell) == docs:
        return None
    asked = len(cell["samples"])
    many = f"{asked} samples" if asked != len(docs) else "as many, but other samples"
    return OTHER, f"not compared: {many}, where most cells of the task have {len(docs)}"


def fill(pooled: Pooled, planned: int, samples: int) -> None:
    """Write into the row what its cells, of so many planned, measured on so many samples."""
    row, cells = pooled.row, pooled.cells
    row.note = f"{planned - len(cells)} of {planned} seeds left out: {row.note}" if row.note else ""
    row.state, row.seeds, row.samples, row.metric = OK, len(cells), samples, cells[0]["metric"]
    row.higher_is_better = bool(cells[0]["metrics"][row.metric].get("higher_is_better", True))
    pooled.values = [float(cell["metrics"][row.metric]["value"]) for cell in cells]
    row.value, row.spread = float(np.mean(pooled.values)), spread(pooled.values)
    for name in MEASURED:
        setattr(row, name, average(measured(cells, name)))
    row.peak_memory_bytes = largest(measured(cells, "peak_memory_bytes"))
    row.elapsed_s = float(sum(cell.get("elapsed_s") or 0 for cell in cells))
    pooled.scores, lacking = sample_scores(pooled)
    row.note = row.note or lacking


def measured(cells: Sequence[Cell], name: str) -> list[Any]:
    """What every cell says of one thing that was measured; None where it does not."""
    return [cell["summary"].get(name) for cell in cells]


def average(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are known."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def largest(values: Iterable[int | None]) -> int | None:
    """The largest of the values that are known."""
    return max((value for value in values if value is not None), default=None)


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation over seeds (n - 1)."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def sample_scores(pooled: Pooled) -> tuple[np.ndarray | None, str]:
    """Scores of the samples, averaged over seeds, or None and why there are none.

    A metric is the mean of its samples' scores, or a hundred times it. A sum or an F1 is not, and resampling its
    samples would give the interval of another quantity.
    """
    scaled, tops = [], set()
    for cell, value in zip(pooled.cells, pooled.values, strict=True):
        scores = [sample["score"] for sample in in_order(cell)]
        if not scores or None in scores:
            return None, f"{pooled.row.metric} has no score per sample, so no interval"
        array = np.array(scores, float)
        scale = scale_of(array, value)
        if scale is None:
            return None, f"{pooled.row.metric} is not the mean of its samples' scores, so no interval"
        scaled.append(scale * array)
        tops.add(scale if array.min() >= 0 and array.max() <= 1 else None)
    pooled.top = tops.pop() if len(tops) == 1 else None
    return np.mean(scaled, 0), ""


def scale_of(scores: np.ndarray, value: float) -> float | None:
    """1 or 100, whichever times the mean of the scores is the metric's value; None where neither is."""
    return next((s for s in (1.0, 100.0) if abs(s * scores.mean() - value) <= 1e-4 * s), None)
