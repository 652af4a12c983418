"""Rows of one task, or of all, beside each other: intervals, differences to two bases, retention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vlmprune.eval import statistics
from vlmprune.eval.report.pooled import Pooled, clusters
from vlmprune.eval.report.rows import NEAR, Row

__all__ = ["Draws", "compare", "contrast"]

#: Bootstrap values (draws,) of rows, by their names.
Draws = dict[str, np.ndarray]


def compare(pooled: Sequence[Pooled]) -> None:
    """Fill in intervals, differences and retention of one task's rows."""
    rows, scored = [p.row for p in pooled], [p for p in pooled if p.scores is not None]
    draws, top = drawn(scored), top_of(scored)
    bound(rows, draws, top)
    contrast(rows, draws, {p.row.name: p.scores for p in scored}, top)
    retain_all([row for row in rows if row.value is not None], draws)


def bound(rows: Sequence[Row], draws: Draws, top: float | None) -> None:
    """Fill in the intervals of rows that have draws."""
    for row in (row for row in rows if row.name in draws):
        found = statistics.mean(draws[row.name], row.value, row.clusters, top)
        row.low, row.high = found.low, found.high


def drawn(scored: Sequence[Pooled]) -> Draws:
    """Bootstrap values of the means of one task's rows, all on the same draws; none where there is one cluster."""
    if not scored:
        return {}
    groups = clusters(scored[0])
    resampler = statistics.Resampler(groups)
    for p in scored:
        p.row.clusters = len(resampler)
    if len(resampler) > 1:
        means = resampler.means(groups, np.stack([p.scores for p in scored], 1))
        return {p.row.name: mean for p, mean in zip(scored, means.T, strict=True)}
    for p in scored:
        p.row.note = p.row.note or "all samples are of one cluster, so no interval"
    return {}


def top_of(pooled: Sequence[Pooled]) -> float | None:
    """What no score of a task is above, none being below 0: 1 or 100; None where the metric is no share."""
    tops = {p.top for p in pooled}
    return tops.pop() if len(tops) == 1 else None


def retain_all(known: Sequence[Row], draws: Draws) -> None:
    """Fill in the retention of rows with a score, where the full model has one."""
    full = next((row for row in known if row.full), None)
    for row in known if full is not None else []:
        retain(row, full, draws)


def retain(row: Row, full: Row, draws: Draws) -> None:
    """Fill in a row's retention of the full model's score, with its interval where both have draws."""
    ratio = float(statistics.retention(row.value, full.value, row.higher_is_better))
    if not np.isfinite(ratio):
        row.note = row.note or f"no ratio to the full model's score ({full.value:g})"
        return
    row.retention = ratio
    if row.name in draws and full.name in draws:
        row.retention_low, row.retention_high = (1.0, 1.0) if row.full else ratio_interval(row, full, draws)


def ratio_interval(row: Row, full: Row, draws: Draws) -> tuple[float | None, float | None]:
    """The interval of a row's retention; where draws show no spread, what the one of the difference says of it."""
    ends = statistics.free_interval(statistics.retention(draws[row.name], draws[full.name], row.higher_is_better))
    if ends[0] is None and row.full_low is not None and row.higher_is_better:
        return tuple((full.value + end) / full.value for end in (row.full_low, row.full_high))
    return ends


def contrast(rows: Sequence[Row], draws: Draws, scores: Mapping[str, np.ndarray], top: float | None = None) -> None:
    """Fill in every row's differences to the full model and to `random`; `scores` are those of the samples by row name,
    and lie between 0 and `top`, if known."""
    for row in (row for row in rows if row.value is not None):
        for name, base in bases(rows, row).items():
            if base.value is None:
                continue
            far = row.value - base.value
            gap, same = drawn_apart(row.name, base.name, draws, scores)
            found, word = statistics.difference(gap, far, row.clusters, top, same, row.higher_is_better)
            for part, value in {"difference": far, "low": found.low, "high": found.high, "verdict": word}.items():
                setattr(row, f"{name}_{part}", value)


def drawn_apart(name: str, base: str, draws: Draws, scores: Mapping[str, np.ndarray]) -> tuple[np.ndarray | None, bool]:
    """The difference of two rows within each draw, if both have draws, and whether all samples score the same."""
    if name not in draws or base not in draws:
        return None, False
    same = np.abs(scores[name] - scores[base]).max() <= statistics.ROUND_OFF
    return draws[name] - draws[base], bool(same)


def bases(rows: Sequence[Row], row: Row) -> dict[str, Row]:
    """What a row is compared to, as far as it exists."""
    full = next((r for r in rows if r.full), None)
    found = {"full": full, "random": None if row.full else random_for(row, rows)}
    return {name: base for name, base in found.items() if base is not None and base is not row}


def random_for(row: Row, rows: Sequence[Row]) -> Row | None:
    """`random` at the same budget, or of the same cost where a row has no budget."""
    mine = [r for r in rows if r.method == "random"]
    return next((r for r in mine if r.budget == row.budget), None) if row.budget else nearest(row, mine)


def nearest(row: Row, drawn: Sequence[Row]) -> Row | None:
    """The `random` that costs what a method on a schedule of its own does, in the mean over layers; the row says so."""
    known = [r for r in drawn if r.value is not None and r.layer_average is not None]
    if not known or row.layer_average is None:
        return None
    base = min(known, key=lambda r: abs(r.layer_average - row.layer_average))
    tokens = f"layer average {base.layer_average:.1f}"
    if abs(base.layer_average - row.layer_average) > NEAR * row.layer_average:
        told = f"no random has a layer average within {NEAR:.0%} of its {row.layer_average:.1f}: "
        row.add_note(f"{told}the nearest is {base.name} ({tokens})")
        return None
    row.random_base = base.name
    row.add_note(f"compared with {base.name} ({tokens}, its own is {row.layer_average:.1f})")
    return base
