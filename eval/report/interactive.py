"""The points of a plot that is drawn on the page itself: axis and task are chosen there, methods switched off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmprune.eval.report.plots import styles, unit
from vlmprune.eval.report.rows import Results, Row
from vlmprune.eval.report.tables import shown
from vlmprune.eval.report.words import short_names

__all__ = ["points"]

#: What may stand from left to right: a field of `Row`, its title, and what its values are multiplied by.
AXES = (
    ("layer_average", "visual tokens, mean over the LLM's layers", 1.0),
    ("ttft_s", "measured time to first token, ms", 1000.0),
    ("tokens_after", "visual tokens entering the LLM", 1.0),
)
SYMBOLS = {
    "o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down", "P": "cross", "X": "x",
    "<": "triangle-left", ">": "triangle-right", "p": "pentagon", "h": "hexagon", "d": "diamond-tall",
    "x": "x-thin", "+": "cross-thin", "1": "y-down", "2": "y-up",
}  # fmt: skip
DASHES = {"-": "solid", ":": "dot", "--": "dash", "": None}


def points(results: Results, model: str) -> dict[str, Any] | None:
    """A model's points as plain values; None where there is no point at all.

    Returns:
        `axes` (name and title), `panels` (a task, or all: name and title of what stands upwards), `looks` by label, and
        `points`: label, budget, panel, `x` by axis, `y` and the ends of its interval, or None.
    """
    tasks = results.tasks(model)
    panels: Sequence[str | None] = [None, *tasks] if len(tasks) > 1 else tasks
    found = [point(i, row) for i, task in enumerate(panels) for row in results.of(model, task) if row.value is not None]
    axes = axes_of(found)
    if not axes:
        return None
    names = short_names(tasks)
    return {
        "model": model,
        "axes": axes,
        "panels": [panel(results.of(model, task), names.get(task or "", "all tasks")) for task in panels],
        "looks": {label: look(style) for label, style in styles(results.of(model, None)).items()},
        "points": found,
    }


def axes_of(found: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The axes on which any point stands."""
    known = {name for one in found for name in one["x"]}
    return [{"name": name, "title": title} for name, title, _ in AXES if name in known]


def panel(rows: Sequence[Row], name: str) -> dict[str, str]:
    """One task, or all."""
    if rows[0].task is None:
        return {"name": name, "title": "retention, % (mean over tasks)"}
    metric = next((row.metric for row in rows if row.metric), "score")
    return {"name": name, "title": metric if rows[0].higher_is_better else f"{metric} (less is better)"}


def look(style: Mapping[str, Any]) -> dict[str, Any]:
    """How a method is drawn; the same as in the still pictures."""
    symbol = SYMBOLS[style["marker"]]
    thin = "markeredgewidth" in style
    hollow = style.get("markerfacecolor") == "white"
    return {
        "color": None if thin else style["color"],  # controls take the page's own grey
        "symbol": f"{symbol}-open" if thin or hollow else symbol,
        "dash": DASHES[style["ls"]],
    }


def point(number: int, row: Row) -> dict[str, Any]:
    """One row in one panel."""
    scale = unit(row)
    x = {name: times * value for name, _, times in AXES if (value := getattr(row, name)) is not None}
    ends = [None if end is None else scale * end for end in (row.low, row.high)]
    return {
        "panel": number,
        "label": "full model" if row.full else row.label,
        "name": f"{shown(row)} {row.budget}".strip(),
        "full": row.full,
        "x": x,
        "y": scale * row.value,
        "low": ends[0],
        "high": ends[1],
    }
