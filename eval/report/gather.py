"""From cell files to comparable rows: seeds pooled, the same samples everywhere, differences with intervals."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlmprune.eval import statistics
from vlmprune.eval.lmms.store import Run
from vlmprune.eval.report.rows import DAMAGED, FAILED, MISSING, NEAR, OK, OTHER, PARTLY, Problem, Results, Row
from vlmprune.spec import budget_text

__all__ = ["gather"]

Cell = Mapping[str, Any]
#: Bootstrap values (draws,) of rows, by their names.
Draws = dict[str, np.ndarray]
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


def gather(run: Run) -> Results:
    """Compare the cells of one run.

    Returns:
        rows of every method, budget and task (without numbers where a cell failed, is missing, or was evaluated on
        other samples than its neighbours), and what is wrong with the run.
    """
    results = Results(run.info, run.cells)
    results.problems += [Problem(c["cell"]["id"], FAILED, str(c["error"])) for c in run.cells if c["error"]]
    results.problems += [
        Problem(name, DAMAGED, run.damaged[name])
        if name in run.damaged
        else Problem(name, MISSING, "not evaluated yet")
        for name in run.missing
    ]
    for model in dict.fromkeys(c["cell"]["model"] for c in run.cells):
        add_model(results, model, [c for c in run.cells if c["cell"]["model"] == model])
    return results


def add_model(results: Results, model: str, cells: list[Cell]) -> None:
    """Add one model's rows, task by task and over all tasks."""
    by: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    methods: dict[str, Cell] = {}
    for cell in cells:
        name = empty(cell, None).name
        methods.setdefault(name, cell)
        by[name, cell["cell"]["task"]].append(cell)
    blank = [empty(cell, None) for cell in methods.values()]
    budgets = list(dict.fromkeys(row.budget for row in blank))
    order = sorted(blank, key=lambda row: (not row.full, budgets.index(row.budget), row.control))
    found: dict[str, dict[str, Pooled]] = {}
    for task in dict.fromkeys(c["cell"]["task"] for c in cells):
        docs = common([c for c in cells if c["cell"]["task"] == task and not c["error"]])
        pooled = [pool(results, empty(methods[row.name], task), by[row.name, task], docs) for row in order]
        found[task] = {p.row.name: p for p in pooled}
        compare(pooled)
        results.rows += [p.row for p in pooled]
    results.rows += overall(order, found)


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


def in_order(cell: Cell) -> list[Mapping[str, Any]]:
    """A cell's samples, in an order that is the same in all cells."""
    return sorted(cell["samples"], key=lambda s: str(s["doc"]))


def identity(cell: Cell) -> tuple[tuple[str, str], ...]:
    """Which questions a cell was asked: documents with their expected answers."""
    return tuple((str(s["doc"]), str(s["target"])) for s in in_order(cell))


def common(cells: Sequence[Cell]) -> tuple[tuple[str, str], ...]:
    """The questions that most cells were asked (of equally frequent sets, the largest): the only ones compared."""
    sets = Counter(identity(cell) for cell in cells)
    return max(sets, key=lambda docs: (sets[docs], len(docs)), default=())


def pool(results: Results, row: Row, cells: list[Cell], docs: tuple[tuple[str, str], ...]) -> Pooled:
    """Fill a row with what its cells say, averaged over seeds."""
    pooled = Pooled(row)
    for cell in cells:
        if cell["error"]:
            row.state, row.note = FAILED, str(cell["error"])
        elif cell["metrics"][cell["metric"]]["value"] is None:
            row.state, row.note = FAILED, f"{cell['metric']} has no value"
            results.problems.append(Problem(cell["cell"]["id"], FAILED, row.note))
        elif identity(cell) != docs:
            many = (
                f"{len(cell['samples'])} samples" if len(cell["samples"]) != len(docs) else "as many, but other samples"
            )
            row.state, row.note = OTHER, f"not compared: {many}, where most cells of the task have {len(docs)}"
            results.problems.append(Problem(cell["cell"]["id"], OTHER, f"{row.note}. Evaluate it again."))
        else:
            pooled.cells.append(cell)
    if not pooled.cells:
        return pooled
    row.note = f"{len(cells) - len(pooled.cells)} of {len(cells)} seeds left out: {row.note}" if row.note else ""
    first = pooled.cells[0]
    row.state, row.seeds, row.metric = OK, len(pooled.cells), first["metric"]
    row.higher_is_better = bool(first["metrics"][row.metric].get("higher_is_better", True))
    pooled.values = [float(cell["metrics"][row.metric]["value"]) for cell in pooled.cells]
    row.value, row.spread, row.samples = float(np.mean(pooled.values)), spread(pooled.values), len(docs)
    for name in MEASURED:
        known = [v for cell in pooled.cells if (v := cell["summary"].get(name)) is not None]
        setattr(row, name, float(np.mean(known)) if known else None)
    peaks = [v for cell in pooled.cells if (v := cell["summary"].get("peak_memory_bytes")) is not None]
    row.peak_memory_bytes = max(peaks, default=None)
    row.elapsed_s = float(sum(cell.get("elapsed_s") or 0 for cell in pooled.cells))
    pooled.scores, lacking = sample_scores(pooled)
    row.note = row.note or lacking
    return pooled


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
        if not scores or any(score is None for score in scores):
            return None, f"{pooled.row.metric} has no score per sample, so no interval"
        array = np.array(scores, float)
        scale = next((s for s in (1.0, 100.0) if abs(s * array.mean() - value) <= 1e-4 * s), None)
        if scale is None:
            return None, f"{pooled.row.metric} is not the mean of its samples' scores, so no interval"
        scaled.append(scale * array)
        tops.add(scale if array.min() >= 0 and array.max() <= 1 else None)
    pooled.top = tops.pop() if len(tops) == 1 else None
    return np.mean(scaled, 0), ""


def top_of(pooled: Sequence[Pooled]) -> float | None:
    """What no score of a task is above, none being below 0: 1 or 100; None where the metric is no share."""
    tops = {p.top for p in pooled}
    return tops.pop() if len(tops) == 1 else None


def clusters(pooled: Pooled) -> list[str]:
    """Each sample's cluster, in the order of `scores`; a document that is its own cluster is never another task's."""
    task = pooled.row.task
    return [
        f"{task}: {s['doc']}" if str(s["cluster"]) == str(s["doc"]) else str(s["cluster"])
        for s in in_order(pooled.cells[0])
    ]


def compare(pooled: Sequence[Pooled]) -> None:
    """Fill in intervals, differences and retention of one task's rows."""
    draws: Draws = {}
    scored = [p for p in pooled if p.scores is not None]
    if scored:
        groups = clusters(scored[0])
        resampler = statistics.Resampler(groups)
        for p in scored:
            p.row.clusters = len(resampler)
        if len(resampler) > 1:
            drawn = resampler.means(groups, np.stack([p.scores for p in scored], 1))
            draws = {p.row.name: drawn[:, i] for i, p in enumerate(scored)}
        else:
            for p in scored:
                p.row.note = p.row.note or "all samples are of one cluster, so no interval"
    rows, top = [p.row for p in pooled], top_of(scored)
    for row in rows:
        if row.name in draws:
            found = statistics.mean(draws[row.name], row.value, row.clusters, top)
            row.low, row.high = found.low, found.high
    contrast(rows, draws, {p.row.name: p.scores for p in scored}, top)
    full = next((row for row in rows if row.full and row.value is not None), None)
    for row in rows if full is not None else []:
        if row.value is None:
            continue
        ratio = float(statistics.retention(row.value, full.value, row.higher_is_better))
        if not np.isfinite(ratio):
            row.note = row.note or f"no ratio to the full model's score ({full.value:g})"
            continue
        row.retention = ratio
        if row.name in draws and full.name in draws:
            ratios = statistics.retention(draws[row.name], draws[full.name], row.higher_is_better)
            row.retention_low, row.retention_high = (1.0, 1.0) if row.full else statistics.free_interval(ratios)
            if row.retention_low is None and row.full_low is not None and row.higher_is_better:
                ends = [(full.value + end) / full.value for end in (row.full_low, row.full_high)]
                row.retention_low, row.retention_high = ends


def contrast(rows: Sequence[Row], draws: Draws, scores: Mapping[str, np.ndarray], top: float | None = None) -> None:
    """Fill in every row's differences to the full model and to `random`; `scores` are those of the samples by row name,
    and lie between 0 and `top`, if known."""
    for row in rows:
        if row.value is None:
            continue
        for name, base in bases(rows, row).items():
            if base.value is None:
                continue
            far, both = row.value - base.value, (row.name, base.name)
            gap, same = None, False
            if all(one in draws for one in both):
                gap = draws[row.name] - draws[base.name]
                same = bool(np.abs(scores[row.name] - scores[base.name]).max() <= statistics.ROUND_OFF)
            found, word = statistics.difference(gap, far, row.clusters, top, same, row.higher_is_better)
            for part, value in {"difference": far, "low": found.low, "high": found.high, "verdict": word}.items():
                setattr(row, f"{name}_{part}", value)


def bases(rows: Iterable[Row], row: Row) -> dict[str, Row]:
    """What a row is compared to, as far as it exists: `full`, and `random` at the same budget, or of the same cost."""
    rows = list(rows)
    full = next((r for r in rows if r.full), None)
    drawn = [r for r in rows if r.method == "random" and not row.full]
    same = next((r for r in drawn if r.budget == row.budget), None) if row.budget else nearest(row, drawn)
    return {name: base for name, base in {"full": full, "random": same}.items() if base is not None and base is not row}


def nearest(row: Row, drawn: Iterable[Row]) -> Row | None:
    """The `random` that costs what a method on a schedule of its own does, in the mean over layers; the row says so."""
    known = [r for r in drawn if r.value is not None and r.layer_average is not None]
    if not known or row.layer_average is None:
        return None
    base = min(known, key=lambda r: abs(r.layer_average - row.layer_average))
    tokens = f"layer average {base.layer_average:.1f}"
    if abs(base.layer_average - row.layer_average) > NEAR * row.layer_average:
        told = f"no random has a layer average within {NEAR:.0%} of its {row.layer_average:.1f}: "
        row.note = "; ".join(filter(None, [row.note, f"{told}the nearest is {base.name} ({tokens})"]))
        return None
    row.random_base = base.name
    told = f"compared with {base.name} ({tokens}, its own is {row.layer_average:.1f})"
    row.note = "; ".join(filter(None, [row.note, told]))
    return base


def overall(blank: Sequence[Row], found: Mapping[str, Mapping[str, Pooled]]) -> list[Row]:
    """The rows over all tasks: the score is the mean retention."""
    draws = retention_draws(blank, found)
    for row in blank:
        pooled = [found[task][row.name] for task in found]
        mine = [p.row for p in pooled]
        done = [r for r in mine if r.retention is not None]
        row.metric, row.seeds, row.state = "retention", max(r.seeds for r in mine), OK
        row.samples = sum(r.samples or 0 for r in mine)
        row.clusters = min((r.clusters for r in mine if r.clusters is not None), default=None)  # the weakest task's
        row.elapsed_s = sum(r.elapsed_s or 0.0 for r in mine)
        row.peak_memory_bytes = max(
            (r.peak_memory_bytes for r in mine if r.peak_memory_bytes is not None), default=None
        )
        for name in MEASURED:
            known = [v for r in mine if (v := getattr(r, name)) is not None]
            setattr(row, name, float(np.mean(known)) if len(known) == len(mine) else None)
        if len(done) < len(mine):
            states = {r.state for r in mine}
            row.state = states.pop() if len(states) == 1 and OK not in states else PARTLY
            left = ", ".join(f"{r.task} ({r.state if r.value is None else 'no ratio'})" for r in mine if r not in done)
            row.note = f"no mean: {len(mine) - len(done)} of {len(mine)} tasks lack a ratio to the full model: {left}"
            draws.pop(row.name, None)
            continue
        row.value = row.retention = float(np.mean([r.retention for r in mine]))
        row.spread = retention_spread(pooled, [found[task][blank[0].name].row for task in found])
        if row.name in draws:
            ends = (1.0, 1.0) if row.full else statistics.free_interval(draws[row.name])
            if ends[0] is None and all(r.retention_low is not None for r in mine):  # the tasks' own, which are exact
                ends = tuple(float(np.mean([getattr(r, f"retention_{end}") for r in mine])) for end in ("low", "high"))
            row.low, row.high = row.retention_low, row.retention_high = ends
        else:
            without = ", ".join(p.row.task for p in pooled if p.scores is None)
            row.note = f"no interval: no scores per sample in {without}" if without else "no interval"
    scores = {name: np.concatenate([found[task][name].scores for task in found]) for name in draws}
    contrast(blank, draws, scores)
    return list(blank)


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


def retention_draws(blank: Sequence[Row], found: Mapping[str, Mapping[str, Pooled]]) -> Draws:
    """Bootstrap values of the mean retention of every row that has scores per sample in every task.

    A picture that several tasks ask about is drawn for all of them at once: their errors may be correlated.
    """
    able = [row.name for row in blank if all(p[row.name].scores is not None for p in found.values())]
    full = next((row.name for row in blank if row.full), None)
    if full not in able:
        return {}
    groups = {task: clusters(pooled[full]) for task, pooled in found.items()}
    if any(len(set(names)) < 2 for names in groups.values()):
        return {}
    ratios = []
    for i, tasks in enumerate(together(groups)):
        resampler = statistics.Resampler([name for task in tasks for name in groups[task]], seed=statistics.SEED + i)
        for task in tasks:
            drawn = resampler.means(groups[task], np.stack([found[task][name].scores for name in able], 1))
            base = drawn[:, [able.index(full)]]
            ratios.append(statistics.retention(drawn, base, found[task][full].row.higher_is_better))
    mean = np.mean(ratios, 0)
    return {name: mean[:, i] for i, name in enumerate(able)}
