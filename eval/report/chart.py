"""A plot as values that the page draws itself (page.js), and as a still picture where nothing is drawn."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from vlmprune import registry
from vlmprune.eval.report import plots, render
from vlmprune.eval.report.document import Plot, Text
from vlmprune.eval.report.interactive import look

__all__ = ["Chart", "Mark", "blind"]


@dataclass(frozen=True)
class Mark:
    """One point: what it belongs to, its name, where it stands by the names of the axes, and the ends of its bar.

    `full` is the unpruned model, through which a line is drawn.
    """

    label: str
    name: str
    x: Mapping[str, float]
    y: float
    low: float | None = None
    high: float | None = None
    panel: int = 0
    full: bool = False


@dataclass(frozen=True)
class Chart:
    """Points that are drawn as a line per label.

    Attributes:
        axes: what may stand from left to right, by name the title; the first is that of the still picture.
        panels: what stands upwards, by name the title.
        points: in panels by number.
        controls: the labels that are grey.
        alone: the labels whose points no line joins.
    """

    axes: Mapping[str, str]
    panels: Mapping[str, str]
    points: Sequence[Mark]
    controls: Collection[str] = ()
    alone: Collection[str] = ()

    @property
    def styles(self) -> dict[str, dict[str, Any]]:
        """Colour, marker and line of every label."""
        labels = list(dict.fromkeys(point.label for point in self.points if not point.full))
        methods = [label for label in labels if label not in self.controls]
        controls = [label for label in labels if label in self.controls]
        looks = {label: plots.method_style(i) for i, label in enumerate(methods)}
        looks |= {label: plots.control_style(i) for i, label in enumerate(controls)}
        return {label: style | ({"ls": ""} if label in self.alone else {}) for label, style in looks.items()}

    def values(self) -> dict[str, Any]:
        """As page.js reads them."""
        told = [asdict(point) | {"label": "full model" if point.full else point.label} for point in self.points]
        return {
            "axes": named(self.axes),
            "panels": named(self.panels),
            "looks": {label: look(style) for label, style in self.styles.items()},
            "points": told,
        }

    def block(self, path: Path, caption: str) -> Plot | Text:
        """The plot of a document; its still picture is drawn into `path` where matplotlib is installed."""
        if not plots.available() and render.plotly() is None:
            return Text("Nothing was drawn: pip install 'vlmprune[plot]'.", warning=True)
        still = [plots.save(self.figure(), path, caption)] if plots.available() else []
        return Plot(self.values(), f"{caption} {plots.CLICK}", still)

    def figure(self) -> Any:
        """The still picture, panel beside panel."""
        figure, panels = plots.room_for(len(self.panels))
        handles: dict[str, Any] = {}
        for number, (panel, title) in enumerate(zip(panels, self.panels.values(), strict=True)):
            handles |= self.draw(panel, [point for point in self.points if point.panel == number])
            panel.set(xlabel=next(iter(self.axes.values())), ylabel=title)
            panel.grid(alpha=0.25)
        figure.legend(handles.values(), handles, loc="outside right upper", frameon=False, fontsize=9, handlelength=3)
        return figure

    def draw(self, panel: Any, points: Sequence[Mark]) -> dict[str, Any]:
        """Draw one panel; returns its legend's entries."""
        axis, handles = next(iter(self.axes)), {}
        points = [point for point in points if axis in point.x]
        for point in (point for point in points if point.full):
            handles["full model"] = panel.plot(point.x[axis], point.y, "*", color="black", ms=13, ls="none")[0]
            panel.axhline(point.y, color="black", lw=0.8, alpha=0.35)
        by_label = groupby(sorted((p for p in points if not p.full), key=lambda p: p.label), lambda p: p.label)
        lines = {label: sorted(mine, key=lambda p: p.x[axis]) for label, mine in by_label}
        for label, style in self.styles.items():
            mine = lines.get(label, [])
            for point in (point for point in mine if point.low is not None):
                ends = [point.low, point.high]
                panel.plot([point.x[axis]] * 2, ends, "-", color=style["color"], lw=1, alpha=0.5)
            if mine:
                places = [point.x[axis] for point in mine], [point.y for point in mine]
                handles[label] = panel.plot(*places, lw=1.2, ms=6.5, **style)[0]
        if points:
            plots.log_ticks(panel, [point.x[axis] for point in points])
        return handles


def blind(methods: Iterable[str]) -> set[str]:
    """Those that look at nothing: the controls."""
    return {name for name in {*methods} & {*registry.names()} if registry.find(name).looks_at == "nothing"}


def named(titles: Mapping[str, str]) -> list[dict[str, str]]:
    """Names and titles."""
    return [{"name": name, "title": title} for name, title in titles.items()]
