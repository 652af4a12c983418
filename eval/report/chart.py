"""A plot as values that the page draws itself (page.js), and as a still picture where nothing is drawn."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
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
        labels = dict.fromkeys(point.label for point in self.points if not point.full)
        looks = plots.looks_of(labels, self.controls)
        for label in looks.keys() & {*self.alone}:
            looks[label]["ls"] = ""
        return looks

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
        axis, handles, styles = next(iter(self.axes)), {}, self.styles
        lines: dict[str, list[Mark]] = {label: [] for label in styles}
        shown = sorted((point for point in points if axis in point.x), key=lambda point: point.x[axis])
        for point in shown:
            if point.full:
                handles["full model"] = draw_full(panel, point.x[axis], point.y)
            else:
                lines[point.label].append(point)
        for label, mine in lines.items():
            if mine:
                handles[label] = draw_line(panel, axis, mine, styles[label])
        if shown:
            plots.log_ticks(panel, [point.x[axis] for point in shown])
        return handles


def draw_full(panel: Any, x: float, y: float) -> Any:
    """A star for the unpruned model, with a line through it; returns what a legend shows."""
    panel.axhline(y, color="black", lw=0.8, alpha=0.35)
    return panel.plot(x, y, "*", color="black", ms=13, ls="none")[0]


def draw_line(panel: Any, axis: str, points: Sequence[Mark], style: Mapping[str, Any]) -> Any:
    """The line of one label, with a bar at every point that has ends; returns what a legend shows."""
    for point in points:
        if point.low is not None:
            panel.plot([point.x[axis]] * 2, [point.low, point.high], "-", color=style["color"], lw=1, alpha=0.5)
    return panel.plot([p.x[axis] for p in points], [p.y for p in points], lw=1.2, ms=6.5, **style)[0]


def blind(methods: Iterable[str]) -> set[str]:
    """Those that look at nothing: the controls."""
    return {name for name in {*methods} & {*registry.names()} if registry.find(name).looks_at == "nothing"}


def named(titles: Mapping[str, str]) -> list[dict[str, str]]:
    """Names and titles."""
    return [{"name": name, "title": title} for name, title in titles.items()]
