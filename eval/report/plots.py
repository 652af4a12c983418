"""The report's pictures: score against tokens and against time, and retention task by task."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
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
#: Of the PNG files.
DPI = 130


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
        folder: where the PNG files go; it is made.
        stem: what the files' names start with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tasks, made = results.tasks(model), []
    whole: list[str | None] = [None] if len(tasks) > 1 else list(tasks)
    for axis in (TOKENS, TIME):
        for panels, end in ((whole, ""), (tasks, "-tasks")) if len(tasks) > 1 else ((whole, ""),):
            figure = scatter(results, model, axis, panels)
            if figure is not None:
                score = "retention (mean over tasks)" if panels == [None] else "score"
                caption = f"{model}: {score} against {axis.title}. {MARKS}"
                caption += f" {SIDEWAYS}" if axis.spread else ""
                made.append(save(figure, folder / f"{stem}-{axis.file}{end}.png", caption))
    figure = heat(results, model)
    if figure is not None:
        caption = f"{model}: retention task by task, in per cent of the full model's score on the same samples. "
        caption += "White: failed, missing, or no ratio."
        made.append(save(figure, folder / f"{stem}-retention.png", caption))
    return made


def save(figure: Any, path: Path, caption: str) -> Picture:
    """Write a figure."""
    made = io.BytesIO()
    figure.savefig(made, format="png", dpi=DPI, bbox_inches="tight", facecolor="white")
    write_whole(path, made.getvalue())
    return Picture(path, caption)


def styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line of every method, the same in all panels and pictures of a model."""
    made: dict[str, dict[str, Any]] = {}
    methods = list(dict.fromkeys(r.label for r in rows if not r.full and not r.control))
    controls = list(dict.fromkeys(r.label for r in rows if not r.full and r.control))
    for i, label in enumerate(methods):
        again = i // len(COLOURS) % 2  # the second time a colour comes, its markers are open and its lines dotted
        colour = COLOURS[i % len(COLOURS)]
        made[label] = {"color": colour, "marker": MARKERS[i % len(MARKERS)], "ls": ":" if again else "-"}
        made[label]["markerfacecolor"] = "white" if again else colour
    for i, label in enumerate(controls):
        colour, marker = GREYS[i % len(GREYS)], CONTROL_MARKERS[i % len(CONTROL_MARKERS)]
        made[label] = {"color": colour, "marker": marker, "ls": "--", "markeredgewidth": 2}
    return made


def scatter(results: Results, model: str, axis: Axis, panels: Sequence[str | None]) -> Any:
    """One panel per task (None: over all tasks); None without any point."""
    from matplotlib.figure import Figure

    panels = [p for p in panels if any(point(r, axis) for r in results.of(model, p))]
    if not panels:
        return None
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    wide, high = {1: (8.4, 5.2), 2: (5.2, 4.2), 3: (4.4, 3.7)}[columns]
    figure = Figure(figsize=(wide * columns, high * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for spare in axes[len(panels) :]:
        spare.set_visible(False)
    looks, handles = styles(results.of(model, None)), {}
    for panel, task in zip(axes, panels, strict=False):
        handles |= draw_panel(panel, results.of(model, task), axis, looks)
    order = [label for label in ("full model", *looks, "Pareto front") if label in handles]
    figure.legend(
        [handles[n] for n in order], order, loc="outside right upper", frameon=False, fontsize=9, handlelength=3
    )
    return figure


def point(row: Row, axis: Axis) -> tuple[float, float] | None:
    """Where a row stands in a panel."""
    x = getattr(row, axis.name)
    return None if x is None or row.value is None else (axis.scale * x, (100 if row.task is None else 1) * row.value)


def draw_panel(panel: Any, rows: Sequence[Row], axis: Axis, looks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Draw one panel; returns its legend's entries."""
    handles: dict[str, Any] = {}
    unit = 100 if rows[0].task is None else 1
    aside = {label: (i + 0.5) / len(looks) - 0.5 for i, label in enumerate(looks)}
    at = [(row, p) for row in rows if (p := point(row, axis)) is not None]
    places = [(x * (1 + axis.spread * (0 if row.full else aside[row.label])), y) for row, (x, y) in at]
    for (row, _), (x, y) in zip(at, places, strict=True):
        if row.low is not None and not (row.full and row.task is None):
            colour = "black" if row.full else looks[row.label]["color"]
            panel.plot([x, x], [unit * row.low, unit * row.high], "-", color=colour, lw=1, alpha=0.5, zorder=2)
        if row.full:
            handles["full model"] = panel.plot(x, y, "*", color="black", ms=13, ls="none", zorder=5)[0]
            panel.axhline(y, color="black", lw=0.8, alpha=0.35, zorder=1)
    for label, look in looks.items():
        mine = sorted(p for (row, _), p in zip(at, places, strict=True) if row.label == label and not row.full)
        if mine:
            x, y = zip(*mine, strict=True)
            handles[label] = panel.plot(x, y, lw=1.2, ms=6.5, zorder=4, **look)[0]
    on_front = statistics.pareto([x for _, (x, _) in at], [better(row, y) for row, (_, y) in at])
    front = sorted(p for p, on in zip(places, on_front, strict=True) if on)
    x, y = zip(*front, strict=True)
    panel.step(x, y, where="post", color="#b8860b", lw=5, alpha=0.22, zorder=1.5, solid_capstyle="round")
    look = {"marker": "o", "ms": 14, "markerfacecolor": "none", "markeredgecolor": "#b8860b", "markeredgewidth": 1.3}
    handles["Pareto front"] = panel.plot(x, y, ls="none", zorder=3, **look)[0]
    if axis.spread:
        log_ticks(panel, [x for _, (x, _) in at])
    first = rows[0]
    less = "" if first.higher_is_better else " (less is better)"
    metric = next((row.metric for row in rows if row.metric), "")
    panel.set_xlabel(axis.title)
    panel.set_ylabel("retention, % (mean over tasks)" if first.task is None else f"{metric}{less}")
    panel.set_title("all tasks" if first.task is None else first.task, fontsize=10)
    panel.grid(alpha=0.25)
    return handles


def better(row: Row, y: float) -> float:
    """The score such that more is better."""
    return y if row.higher_is_better else -y


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
    for (i, j), value in np.ndenumerate(grid):
        dark = np.isfinite(value) and image.norm(value) < 0.55
        look = {"color": "white" if dark else "black", "fontweight": "bold" if columns[j] is None else "normal"}
        text = number(None if np.isnan(value) else value)
        panel.text(j, i, text, ha="center", va="center", fontsize=8.5, **look)
    names = ["all tasks" if task is None else task for task in columns]
    panel.set_xticks(range(len(columns)), names, rotation=35, ha="left", rotation_mode="anchor", fontsize=9)
    panel.xaxis.tick_top()
    panel.set_yticks(range(len(rows)), [f"{shown(row)}  {row.budget}".strip() for row in rows], fontsize=9)
    panel.tick_params(length=0)
    for i in range(1, len(rows)):
        if rows[i].budget != rows[i - 1].budget:
            panel.axhline(i - 0.5, color="white", lw=3)
    if len(columns) > 1:
        panel.axvline(len(columns) - 1.5, color="white", lw=3)
    figure.colorbar(image, ax=panel, label="retention, %", shrink=min(1.0, 9 / max(len(rows), 1)), pad=0.03)
    return figure
