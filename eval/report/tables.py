"""Rows as tables: the page's, and the one that ends `vlmprune eval`."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence

from vlmprune.eval.report import words
from vlmprune.eval.report.document import Table
from vlmprune.eval.report.rows import DAMAGED, OK, Results, Row
from vlmprune.runtime import tables as terminal

__all__ = ["detail", "matrix", "number", "overview", "shown", "summary"]

NONE = "-"
FULL = "full model"
LEGEND = (
    "entering, average: visual tokens at the first layer, and averaged over the layers, of the language model. "
    "retention: score / full model's score, mean over tasks. - random: difference to random at the same budget; "
    "noise: its 95 % interval contains 0."
)
#: Every table shows both counts.
COUNTS = ("tokens entering the LLM", "layer average")
#: What `costs` gives.
COSTS = ("first token, ms", "decode, tokens/s", "peak memory, MiB")


def number(value: float | None, digits: int = 1, sign: bool = False) -> str:
    """A number with so many decimals; `-` for none."""
    return NONE if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def digits(rows: Sequence[Row]) -> int:
    """Decimals that suit a task's unit: 0..1, per cent, or points."""
    largest = max((abs(row.value) for row in rows if row.value is not None), default=0)
    return 3 if largest <= 1.5 else 1


def shown(row: Row) -> str:
    """What the method of a row is called."""
    # all tokens are kept, unless the picture itself is smaller
    smaller = row.method == "downsample" and (row.tokens_after or 0) < (row.tokens_before or 0)
    return FULL if row.full else f"{row.label} (fewer pixels)" if smaller else row.label


def counts(row: Row) -> list[str]:
    """Both counts: tokens entering the language model (before pruning too), and the mean over its layers."""
    before, after = (
        f"{v:.0f}" if v.is_integer() else f"{v:.1f}" for v in (row.tokens_before or 0.0, row.tokens_after or 0.0)
    )
    entering = NONE if row.tokens_after is None else terminal.change(before, after)
    return [entering, number(row.layer_average)]


def with_interval(value: float | None, low: float | None, high: float | None, decimals: int, sign: bool = False) -> str:
    """`92.4 [90.1, 94.0]`."""
    text = number(value, decimals, sign)
    return text if low is None else f"{text} [{number(low, decimals)}, {number(high, decimals)}]"


def scaled(value: float | None, factor: float) -> float | None:
    """A number in another unit."""
    return None if value is None else factor * value


def absent(row: Row) -> str:
    """What stands where a row has no number: its state."""
    return NONE if row.state == OK else row.state


def with_spread(text: str, row: Row, decimals: int, factor: float = 1) -> str:
    """`92.4 ± 0.3 (3 seeds)`, or as it is of one seed."""
    return text if row.spread is None else f"{text} ± {number(factor * row.spread, decimals)} ({row.seeds} seeds)"


def score(row: Row, decimals: int, interval: bool = True) -> str:
    """A row's score in its unit, with the spread over seeds; its state where it has none."""
    if row.value is None:
        return absent(row)
    ends = (row.low, row.high) if interval else (None, None)
    return with_spread(with_interval(row.value, *ends, decimals), row, decimals)


def kept(row: Row) -> str:
    """Retention in per cent with its interval, over all tasks with its spread too; the state where there is none."""
    if row.retention is None:
        return absent(row)
    ends = (None, None) if row.full else (scaled(row.retention_low, 100), scaled(row.retention_high, 100))
    text = with_interval(100 * row.retention, *ends, 1)
    return with_spread(text, row, 1, 100) if row.task is None else text


def difference(row: Row, base: str, decimals: int, factor: float = 1.0) -> str:
    """`-1.2 [-2.0, -0.4] worse`; empty where there is nothing to compare with."""
    parts = [scaled(getattr(row, f"{base}_{part}"), factor) for part in ("difference", "low", "high")]
    if parts[0] is None:
        return ""
    text = with_interval(*parts, decimals, sign=True)
    return f"{text} {getattr(row, f'{base}_verdict') or '(no interval)'}"


def costs(row: Row) -> list[str]:
    """Time to first token (ms), decoding (tokens per second), peak memory (MiB)."""
    first, memory = scaled(row.ttft_s, 1000), scaled(row.peak_memory_bytes, 2**-20)
    return [number(first), number(row.decode_tokens_per_s), number(memory, 0)]


def kinds(rows: Sequence[Row]) -> list[str]:
    """How the table's rows look: the full model, controls, the first row of a budget."""
    made, last = [], None
    for row in rows:
        marks = {"full": row.full, "control": row.control and not row.full, "start": last not in (None, row.budget)}
        made.append(" ".join(name for name, on in marks.items() if on))
        last = row.budget
    return made


def overview(rows: Sequence[Row]) -> Table:
    """The rows over all tasks."""
    header = ["method", "budget", *COUNTS, "retention, % [95 %]", "- random, points", *COSTS]
    cells = [
        [shown(row), row.budget, *counts(row), kept(row), difference(row, "random", 1, 100), *costs(row)]
        for row in rows
    ]
    return Table(header, cells, range(2), kinds(rows))


def matrix(results: Results, model: str) -> Table:
    """One column of scores per task, and the retention over all of them."""
    tasks, rows = results.tasks(model), results.of(model, None)
    of = {task: {row.name: row for row in results.of(model, task)} for task in tasks}
    decimals = {task: digits(list(of[task].values())) for task in tasks}
    cells = [
        [
            *(shown(row), row.budget, *counts(row)),
            *(score(of[task][row.name], decimals[task], interval=False) for task in tasks),
            kept(row),
        ]
        for row in rows
    ]
    heads = [f"{task} ({metric_of(list(of[task].values()), 'no metric')})" for task in tasks]
    return Table(["method", "budget", *COUNTS, *heads, "retention, % [95 %]"], cells, range(2), kinds(rows))


def detail(rows: Sequence[Row]) -> Table:
    """One task's rows with all intervals."""
    decimals = digits(rows)
    header = ["method", "budget", *COUNTS, "score [95 %]", "- full model", "- random", "retention, %", *COSTS]
    cells = [
        [
            *(shown(row), row.budget, *counts(row), score(row, decimals)),
            *(difference(row, "full", decimals), difference(row, "random", decimals), kept(row), *costs(row)),
        ]
        for row in rows
    ]
    return Table(header, cells, range(2), kinds(rows))


def summary(results: Results, wide: int = 120) -> str:
    """The compact table that ends `vlmprune eval`, one block per model; no line is longer than `wide`, nor than the
    terminal."""
    wide = min(wide, terminal.room() or wide)
    own = words.own_schedules([row for row in results.rows if row.task is None])
    said = (LEGEND, *own, *words.few(results.rows), *lacking(results))
    below = "\n".join(textwrap.fill(line, wide) for line in said)
    return "\n\n".join([*(model_summary(results, model, wide) for model in results.models), below])


def model_summary(results: Results, model: str, wide: int) -> str:
    """One model's block: over all tasks, or with the scores of its only one."""
    tasks, rows = results.tasks(model), results.of(model, None)
    first = results.of(model, tasks[0])
    scores = scores_of(first) if len(tasks) == 1 else {}
    header = ["method", "budget", "entering", "average", *(["score"] if scores else [])]
    header += ["retention % [95 %]", "- random, points", "first token"]
    cells = summary_cells(rows, scores)
    about = f"{tasks[0]} ({metric_of(first, '')})" if scores else f"mean over {len(tasks)} tasks"
    cells = shortened(header, cells, wide)
    body = terminal.table(header, cells, [name for name in header[2:] if not name.startswith("- ")], wide)
    return f"{terminal.short(f'{model}: {about}', wide)}\n{body}"


def metric_of(rows: Sequence[Row], none: str) -> str:
    """The metric of a task's rows, or what is said where none has a result."""
    return next((row.metric for row in rows if row.metric), none)


def shortened(header: Sequence[str], cells: Sequence[list[str]], wide: int) -> list[list[str]]:
    """Rows whose methods' names are cut to the room that the other columns leave."""
    room = wide - len(terminal.columns(header[1:], [row[1:] for row in cells], header[1:]).split("\n")[1]) - 2
    return [[terminal.short(row[0], max(12, room)), *row[1:]] if row else row for row in cells]


def summary_cells(rows: Sequence[Row], scores: Mapping[str, str]) -> list[list[str]]:
    """The rows' texts, with an empty line before each budget."""
    cells: list[list[str]] = []
    for row, kind in zip(rows, kinds(rows), strict=True):
        cells += [[]] if "start" in kind else []
        cells.append(summary_row(row, scores))
    return cells


def scores_of(rows: Sequence[Row]) -> dict[str, str]:
    """A task's scores by the rows' names, without the number of their seeds."""
    decimals = digits(rows)
    return {row.name: score(row, decimals, interval=False).partition(" (")[0] for row in rows}


def summary_row(row: Row, scores: Mapping[str, str]) -> list[str]:
    """A row over all tasks; beside a score its retention has no spread, which is that of the score."""
    first = NONE if row.ttft_s is None else f"{1000 * row.ttft_s:.1f} ms"
    start = [shown(row), row.budget, number(row.tokens_after), number(row.layer_average)]
    left = kept(row).partition(" ±" if scores else " (")[0]
    return [*start, *([scores[row.name]] if scores else []), left, difference(row, "random", 1, 100), first]


def lacking(results: Results) -> list[str]:
    """How many planned cells are not in the tables."""
    states = Counter(problem.state for problem in results.problems)
    if not states:
        return []
    many = ", ".join(f"{count} {state}" for state, count in states.items())
    told = [f"Not in this table, of {len(results.info['cells'])} planned cells: {many}. The report lists them."]
    return told + [f"Damaged: {problem.why}" for problem in results.problems if problem.state == DAMAGED][:5]
