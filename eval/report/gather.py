"""From cell files to comparable rows: seeds pooled, the same samples everywhere, differences with intervals."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from vlmprune.eval.lmms.store import StoredRun
from vlmprune.eval.report.compare import compare
from vlmprune.eval.report.overall import overall
from vlmprune.eval.report.pooled import Cell, Pooled, Questions, identity, pool
from vlmprune.eval.report.rows import DAMAGED, FAILED, MISSING, Problem, Results, Row
from vlmprune.spec import budget_text

__all__ = ["gather"]


def gather(run: StoredRun) -> Results:
    """Compare the cells of one run.

    Returns:
        rows of every method, budget and task (without numbers where a cell failed, is missing, or was evaluated on
        other samples than its neighbours), and what is wrong with the run.
    """
    results = Results(run.info, run.cells)
    results.problems += [Problem(c["cell"]["id"], FAILED, str(c["error"])) for c in run.cells if c["error"]]
    results.problems += [absent(run, name) for name in run.missing]
    of: dict[str, list[Cell]] = defaultdict(list)
    for cell in run.cells:
        of[cell["cell"]["model"]].append(cell)
    for cells in of.values():
        add_model(results, cells)
    return results


def absent(run: StoredRun, name: str) -> Problem:
    """A planned cell that has no usable file."""
    return (
        Problem(name, DAMAGED, run.damaged[name])
        if name in run.damaged
        else Problem(name, MISSING, "not evaluated yet")
    )


def add_model(results: Results, cells: list[Cell]) -> None:
    """Add one model's rows, task by task and over all tasks."""
    by: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    of: dict[str, list[Cell]] = defaultdict(list)
    methods: dict[str, Cell] = {}
    for cell in cells:
        name, task = empty(cell, None).name, cell["cell"]["task"]
        methods.setdefault(name, cell)
        by[name, task].append(cell)
        of[task].append(cell)
    order = sort([empty(cell, None) for cell in methods.values()])
    found: dict[str, dict[str, Pooled]] = {}
    for task, mine in of.items():
        docs = common([cell for cell in mine if not cell["error"]])
        pooled = [pool(results, empty(methods[row.name], task), by[row.name, task], docs) for row in order]
        found[task] = {p.row.name: p for p in pooled}
        compare(pooled)
        results.rows += [p.row for p in pooled]
    results.rows += overall(order, found)


def sort(rows: Sequence[Row]) -> list[Row]:
    """The full model first, then budget by budget in the order they come, controls after methods."""
    budgets = list(dict.fromkeys(row.budget for row in rows))
    return sorted(rows, key=lambda row: (not row.full, budgets.index(row.budget), row.control))


def empty(cell: Cell, task: str | None) -> Row:
    """A row without numbers."""
    about, budget = cell["cell"], cell["cell"]["budget"] or {}
    return Row(
        about["model"],
        about["method"],
        about["label"],
        budget_text(budget),
        budget.get("keep"),
        budget.get("average"),
        bool(about["control"]),
        task,
    )


def common(cells: Sequence[Cell]) -> Questions:
    """The questions that most cells were asked (of equally frequent sets, the largest): the only ones compared."""
    sets = Counter(identity(cell) for cell in cells)
    return max(sets, key=lambda docs: (sets[docs], len(docs)), default=())
