"""The rows over all tasks, whose score is the mean of the tasks' retention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vlmprune.eval import statistics
from vlmprune.eval.report.compare import Draws, contrast
from vlmprune.eval.report.pooled import MEASURED, Pooled, clusters, spread
from vlmprune.eval.report.rows import OK, PARTLY, Row

__all__ = ["overall", "together"]

#: A model's pooled rows by task, then by the row's name.
Found = Mapping[str, Mapping[str, Pooled]]


def overall(blank: Sequence[Row], found: Found) -> list[Row]:
    """Fill in the rows over all tasks."""
    draws = retention_draws(blank, found)
    full = [pooled[blank[0].name].row for pooled in found.values()]
    for row in blank:
        over_tasks(row, [mine[row.name] for mine in found.values()], full, draws)
    scores = {name: np.concatenate([pooled[name].scores for pooled in found.values()]) for name in draws}
    contrast(blank, draws, scores)
    return list(blank)


def over_tasks(row: Row, pooled: Sequence[Pooled], full: Sequence[Row], draws: Draws) -> None:
    """Fill in one row from its tasks' rows; without a mean its draws go."""
    add_up(row, [p.row for p in pooled])
    if all(p.row.retention is not None for p in pooled):
        average(row, pooled, full, draws)
    else:
        leave_open(row, [p.row for p in pooled])
        draws.pop(row.name, None)


def average(row: Row, pooled: Sequence[Pooled], full: Sequence[Row], draws: Draws) -> None:
    """Write the mean of the tasks' retention into a row; `full` are the unpruned model's rows."""
    row.value = row.retention = float(np.mean([p.row.retention for p in pooled]))
    row.spread = retention_spread(pooled, full)
    if row.name in draws:
        row.low, row.high = row.retention_low, row.retention_high = ends(row, draws, [p.row for p in pooled])
        return
    without = ", ".join(p.row.task for p in pooled if p.scores is None)
    row.note = f"no interval: no scores per sample in {without}" if without else "no interval"


def add_up(row: Row, mine: Sequence[Row]) -> None:
    """Write into a row what its tasks' rows cost together; what one of them does not know has no mean."""
    row.metric, row.state, row.seeds = "retention", OK, max(r.seeds for r in mine)
    row.samples, row.elapsed_s = sum(known("samples", mine)), sum(known("elapsed_s", mine), 0.0)
    row.clusters = min(known("clusters", mine), default=None)  # the weakest task's
    row.peak_memory_bytes = max(known("peak_memory_bytes", mine), default=None)
    for name in MEASURED:
        values = known(name, mine)
        setattr(row, name, None if len(values) < len(mine) else float(np.mean(values)))


def known(name: str, rows: Sequence[Row]) -> list[Any]:
    """What rows say under one name, as far as they say anything."""
    return [value for row in rows if (value := getattr(row, name)) is not None]


def leave_open(row: Row, mine: Sequence[Row]) -> None:
    """Say which tasks lack a ratio, and why, so that there is no mean."""
    states, lacking = {r.state for r in mine}, [r for r in mine if r.retention is None]
    row.state = states.pop() if len(states) == 1 and OK not in states else PARTLY
    left = ", ".join(f"{r.task} ({r.state if r.value is None else 'no ratio'})" for r in lacking)
    row.note = f"no mean: {len(lacking)} of {len(mine)} tasks lack a ratio to the full model: {left}"


def ends(row: Row, draws: Draws, mine: Sequence[Row]) -> tuple[float | None, float | None]:
    """The interval of the mean retention; where draws show no spread, the mean of the tasks' own, which are exact."""
    if row.full:
        return 1.0, 1.0
    found = statistics.free_interval(draws[row.name])
    if found[0] is None and all(r.retention_low is not None for r in mine):
        return tuple(float(np.mean([getattr(r, f"retention_{end}") for r in mine])) for end in ("low", "high"))
    return found


def retention_spread(pooled: Sequence[Pooled], full: Sequence[Row]) -> float | None:
    """Standard deviation over seeds of the mean retention; None where tasks have different numbers of seeds."""
    if len({len(p.values) for p in pooled}) > 1:
        return None
    pairs = zip(pooled, full, strict=True)
    return spread(
        list(np.mean([statistics.retention(np.array(p.values), f.value, f.higher_is_better) for p, f in pairs], 0))
    )


def together(groups: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Tasks that share clusters, directly or through a third one."""
    made: list[tuple[list[str], set[str]]] = []
    for task, names in groups.items():
        tasks, joined = [task], set(names)
        for other in [m for m in made if m[1] & joined]:
            made.remove(other)
            tasks, joined = other[0] + tasks, other[1] | joined
        made.append((tasks, joined))
    return [tasks for tasks, _ in made]


def retention_draws(blank: Sequence[Row], found: Found) -> Draws:
    """Bootstrap values of the mean retention of every row that has scores per sample in every task.

    A picture that several tasks ask about is drawn for all of them at once: their errors may be correlated.
    """
    able = [row.name for row in blank if scored(row.name, found)]
    full = next((row.name for row in blank if row.full), None)
    if full not in able:
        return {}
    groups = {task: clusters(pooled[full]) for task, pooled in found.items()}
    if any(len(set(names)) < 2 for names in groups.values()):
        return {}
    ratios = [task_ratios(found[task], able, full, resampler, groups[task]) for task, resampler in resamplers(groups)]
    return dict(zip(able, np.mean(ratios, 0).T, strict=True))


def scored(name: str, found: Found) -> bool:
    """Whether a row has scores per sample in every task."""
    return all(pooled[name].scores is not None for pooled in found.values())


def resamplers(groups: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, statistics.Resampler]]:
    """Every task with what draws its clusters: one and the same for all tasks that share some."""
    for i, tasks in enumerate(together(groups)):
        names = [name for task in tasks for name in groups[task]]
        resampler = statistics.Resampler(names, seed=statistics.SEED + i)
        yield from ((task, resampler) for task in tasks)


def task_ratios(
    pooled: Mapping[str, Pooled], able: Sequence[str], full: str, resampler: statistics.Resampler, groups: Sequence[str]
) -> np.ndarray:
    """(draws, rows) retention of the rows called `able` on one task, whose samples' clusters are `groups`."""
    drawn = resampler.means(groups, np.stack([pooled[name].scores for name in able], 1))
    return statistics.retention(drawn, drawn[:, [able.index(full)]], pooled[full].row.higher_is_better)
