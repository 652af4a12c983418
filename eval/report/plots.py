"""The report's pictures: score against tokens and against time, and retention task by task."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from vlmprune.eval import statistics
from vlmprune.eval.report.document import Picture
from vlmprune.eval.report.rows import Results, Row
from vlmprune.eval.report.tables import number, shown
from vlmprune.runtime.files import write_whole

__all__ = ["available", "draw"]

# Okabe & Ito's palette, which people with any colour blindness can tell apart; its yellow is too faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREYS = ("#404040", "#8c8c8c", "#5f5f5f", "#adadad")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "d")
CONTROL_MARKERS = ("x", "+", "1", "2")


@dataclass(frozen=True)
class Axis:
    """What is plotted from left to right."""

    name: str
    file: str
    title: str
    scale: float = 1.0
    #: logarithmic, with points of one count side by side
    spread: float = 0.0


TOKENS = Axis("tokens_after", "tokens", "visual tokens entering the LLM", spread=0.14)
TIME = Axis("ttft_s", "time", "measured time to first token, ms", scale=1000.0)
MARKS = "Rings and the broad stepped line mark the Pareto front: no other point has as high a score for as little. "
MARKS += "Thin bars are 95 % intervals (of scores, not of differences: the tables have those). Controls are grey."
SIDEWAYS = "Points of the same token count are drawn side by side."
CLICK = "A click on a name in the legend takes a method off, a double click all others."
TURN = f"bars are 95 % intervals. {CLICK}"
#: What the file of retention task by task ends with.
HEAT = "retention"
HEAT_CAPTION = "retention task by task, in per cent of the full model's score on the same samples. "
HEAT_CAPTION += "White: failed, missing, or no ratio."
#: Inches of a panel, by how many stand in a line.
PANEL_SIZES = {1: (8.4, 5.2), 2: (5.2, 4.2), 3: (4.4, 3.7)}
GOLD = "#b8860b"
RING = {"marker": "o", "ms": 14, "markerfacecolor": "none", "markeredgecolor": GOLD, "markeredgewidth": 1.3}


def available() -> bool:
    """Whether matplotlib can be imported."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def draw(results: Results, model: str, folder: Path, stem: str) -> list[Picture]:
    """Draw a model's pictures into `folder`; those without any point are left out.

    Args:
        results: the run.
        model: one of its models.
        folder: where the SVG files go; it is made.
        stem: what the files' names start with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tasks = results.tasks(model)
    groups = {"": [None], "-tasks": tasks} if len(tasks) > 1 else {"": tasks}
    todo = [
        (scatter(results, model, axis, panels), f"{axis.file}{end}", points_caption(axis, panels))
        for axis in (TOKENS, TIME)
        for end, panels in groups.items()
    ]
    todo.append((heat(results, model), HEAT, HEAT_CAPTION))
    return [
        save(figure, folder / f"{stem}-{name}.svg", f"{model}: {caption}")
        for figure, name, caption in todo
        if figure is not None
    ]


def points_caption(axis: Axis, panels: Sequence[str | None]) -> str:
    """What a picture of points shows."""
    score = "retention (mean over tasks)" if panels == [None] else "score"
    return f"{score} against {axis.title}. {MARKS}" + (f" {SIDEWAYS}" if axis.spread else "")


def save(figure: Any, path: Path, caption: str) -> Picture:
    """Write a figure."""
    made = io.BytesIO()
    figure.savefig(made, format="svg", bbox_inches="tight", facecolor="white", metadata={"Date": None})
    write_whole(path, made.getvalue())
    return Picture(path, caption)


def styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line of every method, the same in all panels and pictures of a model."""
    pruned = {row.label: row.control for row in rows if not row.full}
    return looks_of(pruned, [label for label, control in pruned.items() if control])


def looks_of(labels: Iterable[str], controls: Collection[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line of every label, the controls last."""
    numbers = {method_style: count(), control_style: count()}
    looks: dict[str, dict[str, Any]] = {}
    for label in sorted(labels, key=lambda label: label in controls):
        style = control_style if label in controls else method_style
        looks[label] = style(next(numbers[style]))
    return looks


def method_style(i: int) -> dict[str, Any]:
    """The look of a model's i-th method; the second time a colour comes, its markers are open and its lines dotted."""
    colour, again = COLOURS[i % len(COLOURS)], i // len(COLOURS) % 2
    line, inside = (":", "white") if again else ("-", colour)
    return {"color": colour, "marker": MARKERS[i % len(MARKERS)], "ls": line, "markerfacecolor": inside}


def control_style(i: int) -> dict[str, Any]:
    """The look of a model's i-th control."""
    marker = CONTROL_MARKERS[i % len(CONTROL_MARKERS)]
    return {"color": GREYS[i % len(GREYS)], "marker": marker, "ls": "--", "markeredgewidth": 2}


def scatter(results: Results, model: str, axis: Axis, panels: Sequence[str | None]) -> Any:
    """One panel per task (None: over all tasks); None without any point."""
    panels = [p for p in panels if any(point(r, axis) for r in results.of(model, p))]
    if not panels:
        return None
    figure, axes = room_for(len(panels))
    looks, handles = styles(results.of(model, None)), {}
    for panel, task in zip(axes, panels, strict=True):
        handles |= draw_panel(panel, results.of(model, task), axis, looks)
    order = [label for label in ("full model", *looks, "Pareto front") if label in handles]
    shown = [handles[label] for label in order]
    figure.legend(shown, order, loc="outside right upper", frameon=False, fontsize=9, handlelength=3)
    return figure


def room_for(panels: int) -> tuple[Any, Sequence[Any]]:
    """A figure with so many panels, and these."""
    from matplotlib.figure import Figure

    columns = min(3, panels)
    lines = math.ceil(panels / columns)
    wide, high = PANEL_SIZES[columns]
    figure = Figure(figsize=(wide * columns, high * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for spare in axes[panels:]:
        spare.set_visible(False)
    return figure, axes[:panels]


@dataclass(frozen=True)
class Point:
    """Where a row stands in a panel: `x` is its cost, `at` where it is drawn, aside of others of the same cost."""

    row: Row
    x: float
    y: float
    at: float


def point(row: Row, axis: Axis, aside: Mapping[str, float] = MappingProxyType({})) -> Point | None:
    """Where a row stands, if it has both numbers; `aside` says by label how far beside its cost it is drawn."""
    cost = getattr(row, axis.name)
    if cost is None or row.value is None:
        return None
    x = axis.scale * cost
    return Point(row, x, unit(row) * row.value, x * (1 + axis.spread * aside.get(row.label, 0) * (not row.full)))


def unit(row: Row) -> int:
    """What scores are drawn in: retention in per cent, a task's score as it is."""
    return 100 if row.task is None else 1


def draw_panel(panel: Any, rows: Sequence[Row], axis: Axis, looks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Draw one panel; returns its legend's entries."""
    aside = {label: (i + 0.5) / len(looks) - 0.5 for i, label in enumerate(looks)}
    points = [p for row in rows if (p := point(row, axis, aside)) is not None]
    draw_bars(panel, points, looks)
    handles = draw_full(panel, points) | draw_methods(panel, points, looks)
    handles["Pareto front"] = draw_front(panel, points)
    if axis.spread:
        log_ticks(panel, [p.x for p in points])
    describe(panel, rows, axis)
    return handles


def draw_full(panel: Any, points: Sequence[Point]) -> dict[str, Any]:
    """Draw the full model with a line through it; returns its legend's entry."""
    handles = {}
    for p in (p for p in points if p.row.full):
        handles["full model"] = panel.plot(p.at, p.y, "*", color="black", ms=13, ls="none", zorder=5)[0]
        panel.axhline(p.y, color="black", lw=0.8, alpha=0.35, zorder=1)
    return handles


def draw_methods(panel: Any, points: Sequence[Point], looks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Draw a line per method; returns their legend's entries."""
    handles = {}
    for label, look in looks.items():
        if mine := [p for p in points if p.row.label == label and not p.row.full]:
            handles[label] = panel.plot(*places(mine), lw=1.2, ms=6.5, zorder=4, **look)[0]
    return handles


def places(points: Sequence[Point]) -> tuple[Sequence[float], Sequence[float]]:
    """Where points are drawn, from left to right."""
    x, y = zip(*sorted((p.at, p.y) for p in points), strict=True)
    return x, y


def draw_bars(panel: Any, points: Sequence[Point], looks: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the intervals; the full model's over all tasks is 100 % by definition."""
    for p in points:
        row = p.row
        if row.low is not None and not (row.full and row.task is None):
            colour, ends = (
                "black" if row.full else looks[row.label]["color"],
                (unit(row) * row.low, unit(row) * row.high),
            )
            panel.plot([p.at, p.at], ends, "-", color=colour, lw=1, alpha=0.5, zorder=2)


def draw_front(panel: Any, points: Sequence[Point]) -> Any:
    """Draw the Pareto front; returns its legend's entry."""
    on_front = statistics.pareto([p.x for p in points], [p.y if p.row.higher_is_better else -p.y for p in points])
    x, y = places([p for p, on in zip(points, on_front, strict=True) if on])
    panel.step(x, y, where="post", color=GOLD, lw=5, alpha=0.22, zorder=1.5, solid_capstyle="round")
    return panel.plot(x, y, ls="none", zorder=3, **RING)[0]


def describe(panel: Any, rows: Sequence[Row], axis: Axis) -> None:
    """Write at a panel what it shows."""
    task, less = rows[0].task, "" if rows[0].higher_is_better else " (less is better)"
    metric = next((row.metric for row in rows if row.metric), "")
    panel.set_xlabel(axis.title)
    panel.set_ylabel("retention, % (mean over tasks)" if task is None else f"{metric}{less}")
    panel.set_title("all tasks" if task is None else task, fontsize=10)
    panel.grid(alpha=0.25)


def log_ticks(panel: Any, values: Sequence[float]) -> None:
    """A logarithmic axis whose ticks are the counts that occur, the most frequent first; linear where one is 0."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    if min(values) <= 0 or max(values) / min(values) < 1.5:
        return
    ticks: list[float] = []
    apart = (max(values) / min(values)) ** (1 / 12)
    for value, _ in Counter(values).most_common():
        if all(max(value, tick) / min(value, tick) >= apart for tick in ticks):
            ticks.append(value)
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}" if v < 100 else f"{v:.0f}"))


def heat(results: Results, model: str) -> Any:
    """Retention of every method at every budget (rows) on every task (columns); None without any."""
    from matplotlib.figure import Figure

    tasks, rows = results.tasks(model), [r for r in results.of(model, None) if not r.full]
    columns = [*tasks, None] if len(tasks) > 1 else list(tasks)
    of = {task: {row.name: row.retention for row in results.of(model, task)} for task in columns}
    grid = np.array([[of[task][row.name] for task in columns] for row in rows], float) * 100
    if not np.isfinite(grid).any():
        return None
    figure = Figure(figsize=(2.6 + 0.8 * len(columns), 1.4 + 0.27 * len(rows)), layout="constrained")
    panel = figure.subplots()
    low = min(float(np.nanmin(grid)), 95.0)
    image = panel.imshow(grid, cmap="cividis", vmin=low, vmax=max(100.0, float(np.nanmax(grid))), aspect="auto")
    write_cells(panel, grid, columns, image.norm)
    write_names(panel, columns, rows)
    figure.colorbar(image, ax=panel, label="retention, %", shrink=min(1.0, 9 / max(len(rows), 1)), pad=0.03)
    return figure


def write_names(panel: Any, columns: Sequence[str | None], rows: Sequence[Row]) -> None:
    """Write what columns and rows are, with white lines between budgets and before what is over all tasks."""
    names = ["all tasks" if task is None else task for task in columns]
    panel.set_xticks(range(len(columns)), names, rotation=35, ha="left", rotation_mode="anchor", fontsize=9)
    panel.xaxis.tick_top()
    panel.set_yticks(range(len(rows)), [f"{shown(row)}  {row.budget}".strip() for row in rows], fontsize=9)
    panel.tick_params(length=0)
    for i, (above, below) in enumerate(pairwise(rows)):
        if above.budget != below.budget:
            panel.axhline(i + 0.5, color="white", lw=3)
    if len(columns) > 1:
        panel.axvline(len(columns) - 1.5, color="white", lw=3)


def write_cells(panel: Any, grid: np.ndarray, columns: Sequence[str | None], shade: Callable[[float], float]) -> None:
    """Write every cell's number, white where the cell is dark, bold over all tasks."""
    for (i, j), value in np.ndenumerate(grid):
        known = np.isfinite(value)
        look = {
            "color": "white" if known and shade(value) < 0.55 else "black",
            "fontweight": "bold" if columns[j] is None else "normal",
        }
        panel.text(j, i, number(value if known else None), ha="center", va="center", fontsize=8.5, **look)
